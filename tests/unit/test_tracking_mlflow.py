"""The MLflow tracker, checked by reading its sqlite file."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from configs.secrets import without_password
from tests.support.mlflow_database import MlflowDatabase
from training.tracking.names import flatten
from training.tracking.record import RunRecord, read_record, write_record
from training.tracking.tracker import MlflowTracker, attach

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs here" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {heads: 4}\n")
    return folder


@pytest.fixture
def database(run_dir: Path) -> MlflowDatabase:
    return MlflowDatabase(run_dir.parent / "mlflow.db")


def start(run_dir: Path, *, uri: str | None = None, heads: int = 4, pause_seconds: float = 5.0) -> MlflowTracker:
    tracker = MlflowTracker(run_dir, name="first", experiment="tests", uri=uri, first_pause_seconds=pause_seconds)
    tracker.start({"model": {"heads": heads}}, run_dir / "config.yaml")
    return tracker


def test_a_run_and_its_restart_are_one_mlflow_run(run_dir: Path, database: MlflowDatabase) -> None:
    first = start(run_dir)
    for step in (1, 2, 3):
        first.metrics(step, {"loss": 10.0 - step, "grad_norm": None})
    first.metrics(2, {"validation_loss": 8.5})
    first.finish("FAILED", wait_seconds=60)
    assert database.rows("select name, status from runs") == [("first", "FAILED")]

    # the restart resumes from a checkpoint of step 1, so it repeats steps 2 and 3
    second = start(run_dir, heads=8)
    _wait_for(lambda: database.rows("select status from runs") == [("RUNNING",)])
    for step in (2, 3, 4):
        second.metrics(step, {"loss": 20.0 - step})
    second.metrics(4, {"validation_loss": 8.0})
    second.artifact(run_dir / "config.yaml", folder="again")
    second.artifact(run_dir / "missing.png")
    second.finish("FINISHED")

    assert database.rows("select name, status from runs") == [("first", "FINISHED")]
    assert database.rows("select key, step, value from metrics order by key, step") == [
        ("loss", 1, 9.0),
        ("loss", 2, 8.0),
        ("loss", 3, 7.0),
        ("loss", 4, 16.0),
        ("validation_loss", 2, 8.5),
        ("validation_loss", 4, 8.0),
    ]
    assert database.rows("select key, value from params") == [("model.heads", "4")]
    assert database.rows("select value from tags where key = 'resumed.model.heads'") == [("8",)]
    [(location,)] = database.rows("select artifact_uri from runs")
    artifacts = Path(unquote(urlsplit(str(location)).path))
    assert artifacts.is_relative_to(run_dir.parent / "mlartifacts")
    assert {str(path.relative_to(artifacts)) for path in artifacts.rglob("*.yaml")} == {
        "config.yaml",
        "again/config.yaml",
    }
    [(run_id,)] = database.rows("select run_uuid from runs")
    assert json.loads((run_dir / "mlflow_run.json").read_text()) == {"run_id": run_id, "uri": None}


def test_a_run_deleted_on_the_server_is_replaced_by_a_new_one(run_dir: Path, database: MlflowDatabase) -> None:
    start(run_dir).finish("FINISHED")
    before = read_record(run_dir)
    database.execute("update runs set lifecycle_stage = 'deleted'")
    start(run_dir).finish("KILLED")
    after = read_record(run_dir)
    assert before is not None
    assert after is not None
    assert after.run_id != before.run_id
    assert database.rows("select status from runs where lifecycle_stage = 'active'") == [("KILLED",)]


def test_an_attached_tracker_keeps_the_status_of_the_run(run_dir: Path, database: MlflowDatabase) -> None:
    assert attach(run_dir, uri=None) is None
    start(run_dir).finish("FAILED")
    for value in (3.0, 2.0):
        attached = attach(run_dir, uri=None)
        assert attached is not None
        attached.metrics(100, {"evaluation/perplexity": value})
        attached.close()
    assert database.rows("select name, status from runs") == [("first", "FAILED")]
    assert database.rows("select step, value from metrics order by timestamp") == [(100, 3.0), (100, 2.0)]


def test_an_unreachable_server_is_one_warning_and_no_delay(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = time.monotonic()
    tracker = start(run_dir, uri=UNREACHABLE)
    for step in range(2000):
        tracker.metrics(step, {"loss": 1.0})
    assert time.monotonic() - before < 1.0
    tracker.finish("FINISHED")
    assert time.monotonic() - before < 20.0
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith(f"MLflow at {UNREACHABLE} cannot be reached")
    assert not (run_dir / "mlflow_run.json").exists()


def test_a_later_command_says_nothing_of_training(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_record(run_dir, RunRecord("1", UNREACHABLE))
    tracker = attach(run_dir, uri=UNREACHABLE)
    assert tracker is not None
    tracker.metrics(1, {"loss": 1.0})
    _wait_for(lambda: "cannot be reached" in caplog.text)
    tracker.close(wait_seconds=0.0)
    assert "training continues" not in caplog.text
    assert f": the records wait in {run_dir / 'tracking'} until it does; " in caplog.text


def test_records_of_an_outage_are_sent_when_it_ends(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_dir.parent / "server"
    folder.write_text("a file in place of the database's folder")
    tracker = start(run_dir, uri=f"sqlite:///{folder}/mlflow.db", pause_seconds=0.2)
    tracker.metrics(1, {"loss": 5.0})
    _wait_for(lambda: "cannot be reached" in caplog.text)
    folder.unlink()
    folder.mkdir()
    tracker.metrics(2, {"loss": 4.0})
    _wait_for((folder / "mlflow.db").exists)
    tracker.finish("FINISHED")
    database = MlflowDatabase(folder / "mlflow.db")
    assert database.rows("select step, value from metrics order by step") == [(1, 5.0), (2, 4.0)]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_more_metrics_than_one_request_takes_arrive(run_dir: Path, database: MlflowDatabase) -> None:
    tracker = start(run_dir)
    for step in range(1, 701):
        tracker.metrics(step, {"loss": float(step), "grad_norm": 1.0})
    tracker.finish("FINISHED")
    assert database.rows("select key, count(*), sum(value) from metrics group by key") == [
        ("grad_norm", 700, 700.0),
        ("loss", 700, 700 * 701 / 2),
    ]


def test_finish_without_start_or_twice_does_nothing(run_dir: Path) -> None:
    tracker = MlflowTracker(run_dir, name="first", experiment="tests", uri=UNREACHABLE)
    tracker.finish("FAILED")
    tracker.finish("FINISHED")


def test_nested_parameters_become_dotted_keys() -> None:
    assert flatten({"model": {"heads": 4, "dir": None}, "lengths": (1, 2), "deep": {"er": {"a": "b"}}}) == {
        "model.heads": "4",
        "lengths": "[1, 2]",
        "deep.er.a": "b",
    }


def test_the_password_of_a_server_is_not_shown() -> None:
    assert without_password("https://me:secret@host:5000/path?x=1") == "https://host:5000/path?x=1"
    assert without_password("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"


def _wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)
