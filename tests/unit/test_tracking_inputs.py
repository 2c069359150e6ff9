"""Datasets and tables of a run in MLflow, read with MLflow's own client."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from configs.load import load_run
from configs.paths import data_folder
from tests.support.compared_runs import add_report
from tests.support.mlflow_database import MlflowDatabase
from training.reproduction.facts import data_facts
from training.tracking.events import SENDERS
from training.tracking.inputs import data_inputs, evaluation_input, inputs_event
from training.tracking.tables import TABLE_COLUMNS, evaluation_table, table_event

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    """MLflow's client of a new store."""
    folder = tmp_path_factory.mktemp("store")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("tests", artifact_location=str(folder / "artifacts"))
    return client


@pytest.fixture
def run_id(client: mlflow.MlflowClient) -> str:
    """A new run."""
    return str(client.create_run("1").info.run_id)


def as_spooled(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as it is read from the spool."""
    spooled: dict[str, Any] = json.loads(json.dumps(event))
    return spooled


def test_prepared_data_are_datasets_with_its_hashes(
    client: mlflow.MlflowClient, run_id: str, prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = load_run("run.yaml")
    event = as_spooled(inputs_event(data_inputs(config)))
    for _ in range(2):  # a resumed run logs them again
        SENDERS["inputs"](client, run_id, event)
    inputs = client.get_run(run_id).inputs.dataset_inputs
    by_context = {each.tags[0].value: each.dataset for each in inputs if each.tags[0].key == "mlflow.data.context"}
    assert [*by_context] == ["training", "validation", "tokenizer"]
    assert len(inputs) == 3
    manifest = json.loads((data_folder(config) / "manifest.json").read_text())
    facts = data_facts(data_folder(config))
    hashes = {"training": facts["sha256"], "validation": facts["sha256"], "tokenizer": manifest["tokenizer_sha256"]}
    for context, dataset in by_context.items():
        assert dataset.digest == hashes[context][:36]
        assert json.loads(dataset.profile)["sha256"] == hashes[context]
        assert Path(json.loads(dataset.source)["uri"]).exists()
    assert [by_context[context].name for context in by_context] == ["book.txt", "book.txt, held out", "tokenizer.model"]
    rows = [json.loads(by_context[context].profile)["num_rows"] for context in ("training", "validation")]
    assert sum(rows) == sum(part["sequences"] for part in manifest["parts"])
    assert data_inputs(load_run("run.yaml", overrides=["data.dir=another"])) == []


def test_an_evaluated_text_is_a_dataset_without_secrets(client: mlflow.MlflowClient, run_id: str) -> None:
    report = {
        "data": {"name": "book.txt", "tokens": 5000, "words": 1000},
        "text_sha256": "ab" * 32,
        "tokenizer_sha256": "cd" * 32,
        "text_path": "/texts/https://me:hunter2@host/book.txt",
    }
    SENDERS["inputs"](client, run_id, as_spooled(inputs_event([evaluation_input(report)])))
    [entry] = client.get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("book.txt", ("ab" * 32)[:36])
    assert entry.tags[0].value == "evaluation"
    assert json.loads(entry.dataset.profile)["num_elements"] == 5000
    assert "hunter2" not in entry.dataset.source


def test_a_names_length_is_no_reason_to_be_refused(client: mlflow.MlflowClient, run_id: str) -> None:
    dataset = {"name": "x" * 900, "sha256": "ab" * 32, "path": None, "context": "training", "profile": {}}
    SENDERS["inputs"](client, run_id, {"kind": "inputs", "datasets": [dataset]})
    [entry] = client.get_run(run_id).inputs.dataset_inputs
    assert entry.dataset.name == "x" * 500


def test_a_table_has_all_checkpoints_and_mlflow_reads_it(
    client: mlflow.MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    add_report(run_dir, {32: 21.25, 64: 20.5}, step=10)
    add_report(run_dir, {32: 25.0}, step=5)
    add_report(run_dir, {32: 30.0}, step=5, text="other.txt")
    shutil.copytree(run_dir / "evaluation" / "step_0000010", run_dir / "evaluation" / "hf-bloom")  # of --hf
    (run_dir / "evaluation" / "step_0000007").mkdir()
    (run_dir / "evaluation" / "step_0000007" / "held-out.json").write_text("{torn")
    for _ in range(2):  # evaluated again: the table is replaced
        table = evaluation_table(run_dir / "evaluation", label="held-out")
        SENDERS["table"](client, run_id, as_spooled(table_event("evaluation/held-out.json", table)))
    SENDERS["table"](client, run_id, as_spooled(table_event("evaluation/other.json", table)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back at the end: MLflow sets it
    mlflow.set_tracking_uri(client.tracking_uri)
    frame = client.load_table("1", "evaluation/held-out.json", run_ids=[run_id])
    mlflow.set_tracking_uri(None)
    assert [*frame.columns][: len(TABLE_COLUMNS)] == [*TABLE_COLUMNS]
    seen = frame[["step", "checkpoint", "length", "x_trained", "perplexity"]].to_numpy().tolist()
    assert seen == [
        [5, "step_0000005", 32, 1.0, 25.0],
        [10, "step_0000010", 32, 1.0, 21.25],
        [10, "step_0000010", 64, 2.0, 20.5],
    ]
    database = MlflowDatabase(Path(client.tracking_uri.removeprefix("sqlite:///")))
    query = f"select value from tags where key = 'mlflow.loggedArtifacts' and run_uuid = '{run_id}'"
    [(tag,)] = database.rows(query)
    assert json.loads(str(tag)) == [
        {"path": "evaluation/held-out.json", "type": "table"},
        {"path": "evaluation/other.json", "type": "table"},
    ]
