"""A command that adds to the MLflow run of a training closes its tracker, however it ends."""

import shutil
import threading
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from configs.errors import InputError
from tests.support.command_line import Call
from tests.support.evaluation import UniformModel
from tests.support.house.source import HOUSE
from tests.support.spooled import attach_offline, begin_mlflow_run
from training.tracking.tracker import MlflowTracker

COMMANDS = {
    "training.evaluation.run": ("evaluate", "run", "--data", "text.txt", "--lengths", "16"),
    "training.retrieval.run": ("retrieval", "run", "--data", "text.txt", "--lengths", "320", "--tasks", "single"),
}


class Interrupted(UniformModel):
    """A model that is interrupted at once."""

    def losses(self, *_: Any, **__: Any) -> Any:
        """Raise what Ctrl-C does."""
        raise KeyboardInterrupt

    fit_length = losses


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_that_fails_closes_its_tracker(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainshort: Call
) -> None:
    shutil.copytree(HOUSE / "tests" / "fixtures" / "run_of_0.1.0", tmp_path / "run")
    (tmp_path / "text.txt").write_text("\n".join(topics.values())[:20_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    begin_mlflow_run(tmp_path / "run")
    trackers: list[MlflowTracker | None] = []

    def attach(run_dir: Path, **options: Any) -> MlflowTracker | None:
        trackers.append(attach_offline(run_dir, **options))
        return trackers[-1]

    def broken(*_: Any, **__: Any) -> None:
        raise InputError("weights are broken: use another checkpoint")

    monkeypatch.setattr("training.tracking.tracker.attach", attach)
    for load, code in ((broken, 2), (lambda *_, **__: Interrupted(), 130)):
        monkeypatch.setattr(f"{module}.load_single", load)
        answer = trainshort(*COMMANDS[module])
        assert (answer.code, "weights are broken" in answer.error) == (code, code == 2), answer
        assert isinstance(trackers.pop(), MlflowTracker)
        assert not [thread for thread in threading.enumerate() if thread.name == "mlflow"]
    assert not trackers
