"""What a run is called in MLflow: its metrics, parameters, tags and files."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

from configs.load import dump_run, load_run
from configs.rules import problems
from configs.schema import RunConfig
from tests.support.mlflow_database import MlflowDatabase
from tests.support.steps import step_result
from training.families.table import parameter_count
from training.observers import StepResult
from training.tracking.names import BY_NAME, METRIC_NAMES
from training.tracking.observer import TrackingObserver
from training.tracking.tracker import MlflowTracker, attach

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3",
    "world_size": 8,
    "layout": {"tensor": 2, "pipeline": 2, "data": 2, "zero": 1},
    "slurm": None,
    "code": {"commit": "c0ffee", "branch": "main", "repository": "https://host/our/code.git", "diff": "+x"},
}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def database(run_dir: Path) -> MlflowDatabase:
    return MlflowDatabase(run_dir.parent / "mlflow.db")


def observe(run_dir: Path, *results: StepResult, environment: Mapping[str, Any] = ENVIRONMENT) -> RunConfig:
    """Observe one start of the demo run; return the run."""
    config = load_run("demo", overrides=[f"run.dir={run_dir}", "slurm.env={HF_TOKEN: x}"])
    (run_dir / "config.yaml").write_text(dump_run(config))
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    certificate = run_dir / "certificates.jsonl"
    with certificate.open("a") as file:
        file.write(json.dumps({"step": 0, "ranks": [{"backend": "flex"}, {"backend": "flex"}]}) + "\n")
    observer = TrackingObserver(config, run_dir=run_dir, certificate=certificate)
    for result in results:
        observer.on_step(result)
    observer.close("FINISHED")
    return config


def test_tags_that_mlflow_refuses_are_no_tags_of_a_run_file() -> None:
    names = ["".join(letters) for size in range(5) for letters in itertools.product("a./ :#", repeat=size)]
    runs: list[Any] = [SimpleNamespace(track=SimpleNamespace(tags={name: "1"})) for name in names]
    taken = [name for name, run in zip(names, runs, strict=True) if not problems(run, partial=True)]
    assert taken == [name for name in names if validate_param_and_metric_name(name) and not path_not_unique(name)]


def test_every_field_of_a_step_has_a_name_in_a_group() -> None:
    assert {*METRIC_NAMES} == {field.name for field in fields(StepResult)} - {"step", *BY_NAME}
    assert len({*METRIC_NAMES.values()}) == len(METRIC_NAMES)
    assert {name.partition("/")[0] for name in METRIC_NAMES.values()} == {
        "train",
        "time",
        "memory",
        "validation",
        "energy",
    }


def test_a_metric_without_a_name_says_where_names_are(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METRIC_NAMES, "loss")
    with pytest.raises(AssertionError, match=r"add to METRIC_NAMES in training/tracking/names\.py what .* loss"):
        observe(run_dir, step_result(step=1))


def test_steps_that_were_taken_again_are_logged_again(run_dir: Path, database: MlflowDatabase) -> None:
    def losses() -> list[tuple[int, float]]:
        rows = database.rows("select step, value from metrics where key = 'train/loss'")
        return sorted((step, value) for step, value in rows)

    taken = [step_result(step=step, tokens_seen=32 * step, loss=4.0) for step in (1, 2, 3)]
    observe(run_dir, *taken)
    again = [step_result(step=step, tokens_seen=32 * step, loss=2.0) for step in (2, 3, 4)]
    observe(run_dir, again[0])
    assert losses() == [(1, 4.0), (2, 4.0), (3, 4.0)], "after a kill a step has the same value"
    went_back = {"step": 1, "next_sample": 4, "left_out": 8, "from_step": 3, "why": "nan", "at": "now"}
    (run_dir / "rollbacks.json").write_text(json.dumps({"rollbacks": [went_back]}))
    observe(run_dir, *again)
    assert losses() == [(1, 4.0), (2, 2.0), (2, 4.0), (3, 2.0), (3, 4.0), (4, 2.0)]
    by_tokens = database.rows("select step, value from metrics where key = 'by_tokens/train_loss'")
    assert sorted(by_tokens)[1:3] == [(64, 2.0), (64, 4.0)]


def test_a_run_is_logged_as_mlflow_users_expect(run_dir: Path, database: MlflowDatabase) -> None:
    config = observe(run_dir, step_result(step=1), step_result(step=2, validation_loss=4.0, validation_seconds=0.5))
    metrics = {(key, step): value for key, step, value in database.rows("select key, step, value from metrics")}
    assert metrics["train/loss", 1] == metrics["train/loss", 2] == 2.0
    assert metrics["time/tokens_per_second", 1] == 640.0
    assert metrics["memory/peak_gb", 2] == 1.0
    assert {name for name, step in metrics if step == 2} - {name for name, step in metrics if step == 1} == {
        "validation/loss",
        "time/validation_seconds",
    }
    params = dict(database.rows("select key, value from params"))
    assert params["parameters"] == str(parameter_count(config.model, vocab_size=config.data.vocab_size))
    assert {key: params[key] for key in ("world_size", "device", "precision", "attention_backend")} == {
        "world_size": "8",
        "device": "NVIDIA H100 80GB HBM3",
        "precision": "fp32",
        "attention_backend": "flex",
    }
    assert [params[f"layout.{axis}"] for axis in ("tensor", "pipeline", "data", "zero")] == ["2", "2", "2", "1"]
    assert params["model.heads"] == str(config.model.heads)
    assert "None" not in params.values()
    assert not [key for key in params if key.startswith("slurm.")]

    tags = dict(database.rows("select key, value from tags"))
    assert {key: value for key, value in tags.items() if key.startswith("mlflow.source")} == {
        "mlflow.source.name": "trainshort train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.repoURL": "https://host/our/code.git",
        "mlflow.source.git.dirty": "true",
    }
    assert tags["mlflow.user"] == database.rows("select user_id from runs")[0][0] != "unknown"
    [(location,)] = database.rows("select artifact_uri from runs")
    artifacts = {path.name for path in Path(unquote(urlsplit(str(location)).path)).iterdir()}
    assert artifacts == {"config.yaml", "environment.json", "certificates.jsonl"}


def test_losses_are_drawn_over_tokens_too(run_dir: Path, database: MlflowDatabase) -> None:
    steps = [step_result(step=step, tokens_seen=1_000_000 * step, loss=9.0 - step) for step in (1, 2, 3)]
    validated = dataclasses.replace(steps[1], validation_loss=4.0)
    observe(run_dir, steps[0], validated)
    observe(run_dir, validated, steps[2])  # resumed from a checkpoint of step 1
    query = "select key, step, value from metrics where key like 'by_tokens/%' order by key, step"
    assert database.rows(query) == [
        *[("by_tokens/train_loss", 1_000_000 * step, 9.0 - step) for step in (1, 2, 3)],
        ("by_tokens/validation_loss", 2_000_000, 4.0),
    ]


def test_energy_is_summed_over_all_starts(run_dir: Path, database: MlflowDatabase) -> None:
    steps = [step_result(step=step, energy_joules=360_000.0) for step in (1, 2, 3)]
    observe(run_dir, step_result(step=0), *steps[:2])
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(step.fields())}\n" for step in steps[:2]))
    observe(run_dir, steps[2])
    query = "select step, value from metrics where key = 'energy/{}' order by step"
    assert database.rows(query.format("step_joules")) == [(step, 360_000.0) for step in (1, 2, 3)]
    assert database.rows(query.format("total_kwh")) == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]


def test_a_value_that_is_too_long_is_whole_in_a_file(
    run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.tracking.observer.run_params", lambda *_, **__: {"data": {"sources": ["é" * 7000]}})
    (run_dir / "reproduce.json").write_text("{}")
    observe(run_dir)
    [(value,)] = database.rows("select value from params where key = 'data.sources'")
    assert str(value).startswith('["ééé')
    assert str(value).endswith("é ... (whole in long_params.json)")
    assert len(str(value)) == 6000
    client = mlflow.MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    [run] = client.search_runs(["1"])
    whole = client.download_artifacts(run.info.run_id, "long_params.json", str(run_dir))
    assert json.loads(Path(whole).read_text()) == {"data.sources": json.dumps(["é" * 7000], ensure_ascii=False)}
    assert {"reproduce.json", "config.yaml"} <= {each.path for each in client.list_artifacts(run.info.run_id)}


def test_a_job_of_slurm_is_named_and_its_section_logged(run_dir: Path, database: MlflowDatabase) -> None:
    observe(run_dir, environment={})  # of a wheel, which has no commit
    assert database.rows("select key from tags where key like '%git%'") == []
    assert database.rows("select key from params where key in ('device', 'layout.tensor')") == []
    job = {"job_id": "17", "nodes": "node[1-2]"}
    observe(run_dir, environment={**ENVIRONMENT, "slurm": job, "code": {"commit": "beef", "diff": ""}})
    tags = dict(database.rows("select key, value from tags"))
    assert (tags["slurm.job_id"], tags["slurm.nodes"], tags["mlflow.source.type"]) == ("17", "node[1-2]", "JOB")
    assert (tags["mlflow.source.git.commit"], tags["mlflow.source.git.dirty"]) == ("beef", "false")
    assert database.rows("select value from params where key = 'slurm.env.HF_TOKEN'") == [("***",)]


def test_a_run_begun_under_old_names_is_logged_once(run_dir: Path, database: MlflowDatabase) -> None:
    old = MlflowTracker(run_dir, name="first", experiment=None, uri=None)
    (run_dir / "config.yaml").touch()
    old.start({}, run_dir / "config.yaml")
    for step in (1, 2, 3):
        old.metrics(step, {"loss": 9.0})
    old.finish("KILLED")
    observe(run_dir, step_result(step=3), step_result(step=4))  # resumed from a checkpoint of step 2
    observe(run_dir, step_result(step=4), step_result(step=5))
    losses = "select key, step from metrics where key like '%loss' and key not like 'by_tokens/%' order by key, step"
    assert database.rows(losses) == [
        *[("loss", step) for step in (1, 2, 3)],
        *[("train/loss", step) for step in (3, 4, 5)],
    ]


def test_a_later_command_logs_a_curve_over_length(run_dir: Path, database: MlflowDatabase) -> None:
    observe(run_dir)
    for perplexity in (70.0, 60.0):  # evaluated twice: the newer values come last
        attached = attach(run_dir, uri=None)
        assert attached is not None
        for length in (128, 256, 512):
            attached.metrics(length, {"evaluation/held-out/step_0000100/perplexity": perplexity + 1 / length})
        attached.close()
    rows = database.rows(
        "select step, round(value) from metrics where key like 'evaluation/%' order by timestamp, step"
    )
    assert rows == [(length, value) for value in (70.0, 60.0) for length in (128, 256, 512)]
