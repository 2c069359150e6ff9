"""Ranks that are killed cannot end their MLflow run: their launcher does."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from configs.paths import incarnation_file
from launch import local
from launch.local import STOPPED_BY_HAND
from tests.support.command_line import Call
from training import preflight
from training.incarnation import begin_incarnation
from training.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def statuses(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return [status for (status,) in database.execute("select status from runs")]


def test_the_launcher_ends_the_mlflow_run_of_killed_ranks(
    folder: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = folder / "run"
    monkeypatch.setattr(preflight, "load_trainable", lambda *_, **__: Mock(vocab_size=600))  # no rank reads it
    said: list[str] = []

    def train(code: int, *, until: str | None = None, alive: bool = False) -> list[str]:
        """Start training with ranks that leave what killed ranks leave, and return the status of each MLflow run."""

        def start_ranks(*_: object, **__: object) -> int:
            begin_incarnation(run_dir)
            tracker = MlflowTracker(run_dir, name="small", experiment="small", uri=None)
            tracker.start({}, folder / "run.yaml")
            if until:
                tracker.finish(until)  # type: ignore[arg-type]
            else:
                tracker.close()
            assert statuses(folder) == [until or "RUNNING"]
            if not alive:
                values = json.loads(incarnation_file(run_dir).read_text())
                incarnation_file(run_dir).write_text(json.dumps({**values, "process_started": 1}))
            return code

        monkeypatch.setattr(local, "start_ranks", start_ranks)
        answer = trainshort("train", "run.yaml", "--ranks", "4")
        assert answer.code == code
        said[:] = answer.error.splitlines()
        return statuses(folder)

    assert train(STOPPED_BY_HAND) == ["KILLED"], "a second Ctrl-C"
    how = [
        "ended without saving: no finished step is lost, there is no checkpoint",
        "to continue: trainshort train run.yaml --ranks 4",
    ]
    assert said[-2:] == how
    assert train(1) == ["FAILED"], "killed for memory"
    assert said[-2:] == how
    assert train(1, until="FINISHED") == ["FINISHED"], "rank 0 has ended it"
    assert train(1, alive=True) == ["RUNNING"], "a newer start trains"
    assert not [line for line in said if line in how], "what is lost is the newer start's matter"
