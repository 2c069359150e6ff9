"""Exported models in MLflow's Model Registry, read and run with MLflow's own client."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
import torch

from configs.errors import InputError, MachineError
from configs.schema import Track
from data_pipeline.tokenizer import load_tokenizer
from tests.support.formula_model import FormulaModel, open_formula_model
from training.export.run import export_checkpoint
from training.tracking.registry import open_registry
from training.tracking.tracker import MlflowTracker

# warnings of sqlalchemy about mlflow's queries, and of mlflow about transformers' files
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]

NAME, PROMPT, NEW_TOKENS = "small model", "The quick brown", 12
CERTIFICATE = {
    "position": "alibi",
    "step": 10,
    "ranks": [{"rank": 0, "error": 1e-7, "precision": "fp32", "tensor_rank": 0, "stage": 0, "data_rank": 0}],
}
"""Of one rank, with what its verdict is made of."""


@pytest.fixture(scope="module")
def tracked_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run folder that has an MLflow run, and its store; tests copy it."""
    folder = tmp_path_factory.mktemp("tracked")
    run_dir = folder / "no run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("a: 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = MlflowTracker(run_dir, name="small", experiment="tests", uri=None)
        tracker.start({"a": 1}, run_dir / "config.yaml")
        tracker.finish("FINISHED")
    return folder


@pytest.fixture
def model(
    tmp_path: Path, tracked_once: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> FormulaModel:
    """A checkpoint of step 10 in a run folder with an MLflow run."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(tracked_once, tmp_path, dirs_exist_ok=True)
    opened = open_formula_model(tmp_path, run_values, monkeypatch)
    ranks = [{**rank, "heads": [0], "backend": "sdpa", "device": "cpu"} for rank in CERTIFICATE["ranks"]]
    opened.certificate = {**CERTIFICATE, "ranks": ranks}
    return opened


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """MLflow's client of the run's store, in a process that uses that store."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back at the end: MLflow sets it
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(uri)
    mlflow.set_tracking_uri(None)


def read_run_id(folder: Path) -> str:
    """Return the id of the run folder's MLflow run."""
    return str(json.loads((folder / "no run" / "mlflow_run.json").read_text())["run_id"])


def continuation(model: FormulaModel, tokenizer: Any) -> str:
    """Return the greedy text of the formula."""
    ids = tokenizer.encode(PROMPT)
    for _ in range(NEW_TOKENS):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return str(tokenizer.decode(ids))


def test_a_registered_model_says_what_the_trained_one_says(
    model: FormulaModel, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    results = [export_checkpoint(tmp_path, format="hf", out=tmp_path / n, register=NAME) for n in ("a", "b")]
    assert [result.registered and result.registered.version for result in results] == [1, 2]
    assert str(results[0].registered).startswith(f"models:/{NAME}/1 (alias step-10) in MLflow at sqlite:///")
    expected = continuation(model, load_tokenizer(tmp_path / "tokenizer.model"))
    served = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    assert served.predict([PROMPT], params={"max_new_tokens": NEW_TOKENS}) == [expected]
    assert served.metadata.signature.inputs.to_dict() == [{"type": "string", "required": True}]
    assert {each["name"]: each["default"] for each in served.metadata.signature.params.to_dict()}["do_sample"] is False
    assert served.input_example == ["Once upon a time"]
    [answer] = mlflow.transformers.load_model(f"models:/{NAME}@step-10")(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert answer["generated_text"] == expected

    version = client.get_model_version_by_alias(NAME, "step-10")
    card = json.loads((tmp_path / "b" / "export.json").read_text())
    assert (version.version, version.run_id) == (2, read_run_id(tmp_path))
    assert {key: version.tags[key] for key in ("run", "step", "trained_length", "verified_lengths", "dtype")} == {
        "run": "small",
        "step": "10",
        "trained_length": "32",
        "verified_lengths": "32, 128",
        "dtype": "fp32",
    }
    assert version.tags["certificate"] == "ALiBi verified on 1 rank; largest error 1e-07, allowed 1e-05"
    assert version.tags["tokenizer_sha256"] == card["origin"]["tokenizer_sha256"]
    run = client.get_run(read_run_id(tmp_path))
    [first, second] = [client.get_logged_model(each.model_id) for each in run.outputs.model_outputs]
    assert {first.status, second.status} == {"READY"}
    uploaded = Path(unquote(urlsplit(second.artifact_location).path)) / "model"
    assert {path.name for path in uploaded.iterdir()} == {path.name for path in (tmp_path / "b").iterdir()}
    assert not any(path.is_symlink() for path in uploaded.iterdir())


@pytest.mark.usefixtures("model")
def test_a_store_that_cannot_register_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.export.run.compute_trained", lambda *_, **__: pytest.fail("the export has begun"))
    (tmp_path / "no run" / "mlflow_run.json").unlink()
    for name, uri, problem, kind in (
        ("a/b", None, r"--register 'a/b' is not a name for a model in MLflow: use 1 to 250 letters", InputError),
        ("", None, "--register '' is not a name", InputError),
        (
            NAME,
            "file:///tmp/mlruns",
            f"--register {NAME} is not possible: MLflow at file:///.* maintenance",
            InputError,
        ),
        (NAME, "nothing://host", "but MLflow knows no nothing: use", InputError),
        (NAME, "http://me:hunter2@127.0.0.1:9", r"MLflow at http://127.0.0.1:9 says .*refused", MachineError),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri or "")
        with pytest.raises(kind, match=problem) as error:
            export_checkpoint(tmp_path, format="hf", out=tmp_path / "a", register=name)
        assert "hunter2" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="MLflow cannot load gguf: drop --register, or use --format hf"):
        export_checkpoint(tmp_path, format="gguf", out=tmp_path / "a", register=NAME)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "no run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=rf"--register {NAME} needs an MLflow store: .* is not a run folder"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "a", register=NAME)
    assert not (tmp_path / "a").exists()


class NoRegistry(BaseHTTPRequestHandler):
    """A server that tracks runs and has no registry."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.usefixtures("model")
def test_a_server_without_registry_is_the_users_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), NoRegistry)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    (tmp_path / "no run" / "mlflow_run.json").unlink()
    with pytest.raises(InputError, match=r"is not possible: MLflow at http://[\d.:]+ has no Model Registry; leave"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "a", register=NAME)
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("model")
def test_a_model_without_a_run_is_registered_alone(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "no run" / "mlflow_run.json").unlink()  # as of an imported model
    registered = export_checkpoint(tmp_path, format="hf", out=tmp_path / "a", register=NAME).registered
    assert registered is not None
    assert client.get_model_version(NAME, "1").run_id in (None, "")
    # an export that cannot be registered stays, and the message says so
    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifacts", full_disk)
    with pytest.raises(MachineError, match=rf"/b is exported, but not registered as {NAME}: .* No space left"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "b", register=NAME)
    assert (tmp_path / "b" / "config.json").is_file()
    models = client.search_logged_models([each.experiment_id for each in client.search_experiments()])
    assert sorted(model.status for model in models) == ["FAILED", "READY"]


@pytest.mark.usefixtures("model")
def test_a_registered_model_moves_with_its_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("no run", "mlflow.db", "mlartifacts"):
        (tmp_path / name).rename(here / name)
    registry = open_registry(NAME, run_dir=here / "no run", track=Track())
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "a").folder
    assert registry.register(exported).version == 1
    here.rename(there)
    assert open_registry(NAME, run_dir=there / "no run", track=Track()).register(exported).version == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    mlflow.set_tracking_uri(f"sqlite:///{there}/mlflow.db")
    for version in (1, 2):
        assert mlflow.pyfunc.load_model(f"models:/{NAME}/{version}").predict([PROMPT])
    mlflow.set_tracking_uri(None)
