"""One writer per run: a newer start takes over, and an older one stops itself and writes nothing more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.commands import name_run_file
from configs.errors import InputError
from parallel.engine import StepOutcome
from tests.support.command_line import contents
from tests.support.one_rank import STEPS, OneRank
from tests.support.steps import step_result
from training import incarnation
from training.checkpoint import disk, write
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.rank_part import SaveError
from training.checkpoint.retention import remove_unfinished
from training.incarnation import (
    Fence,
    Superseded,
    begin_incarnation,
    newest_incarnation,
    refuse_second_start,
    sole_launcher,
)
from training.metrics_file import MetricsFile
from training.observers import Observer, StepResult
from training.tracking.observer import TrackingObserver
from training.tracking.tracker import MlflowTracker
from training.trainer import Trainer


def test_each_start_is_newer_than_those_before(tmp_path: Path) -> None:
    first = begin_incarnation(tmp_path)
    assert first.is_ours()
    first.check()
    second = begin_incarnation(tmp_path)
    assert (first.is_ours(), second.is_ours()) == (False, True)
    with pytest.raises(
        Superseded, match=r"was started again on .* and this older start \(1-\w{8}\) stops without writing"
    ) as error:
        first.check()
    assert error.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["incarnation"]
    newest = newest_incarnation(tmp_path)
    assert newest is not None
    assert (newest.number, newest.token, newest.pid) == (2, second.token, os.getpid())


def test_a_damaged_incarnation_file_stops_nobody(tmp_path: Path) -> None:
    fence = begin_incarnation(tmp_path)
    (tmp_path / "incarnation").write_text("{")
    assert fence.is_ours()
    (tmp_path / "incarnation").unlink()
    assert fence.is_ours()


def test_an_unreadable_incarnation_stops_saves_not_training(
    rank: OneRank, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = begin_incarnation(tmp_path)
    (tmp_path / "incarnation").unlink()
    (tmp_path / "incarnation").mkdir()  # reading it is an OSError
    assert fence.may_be_ours()
    with pytest.raises(IsADirectoryError):
        fence.check()
    run_dir, real = tmp_path / "run", MetricsFile.on_step

    def unreadable(self: MetricsFile, step: StepResult) -> None:
        real(self, step)
        if step.step == 2:
            (run_dir / "incarnation").unlink()
            (run_dir / "incarnation").mkdir()

    waited: list[float] = []
    monkeypatch.setattr(MetricsFile, "on_step", unreadable)
    monkeypatch.setattr(MetricsFile, "on_save_wait", lambda _, seconds, goes_on: waited.append(seconds))
    with pytest.raises(
        SaveError, match=r"step_0000003 was not saved \(Is a directory .*/incarnation\): free space, or"
    ):
        rank.start(run_dir, steps=3)
    assert caplog.text.count("NOT SAVED") == 2, "step 2, and step 3 before its error"
    assert len(waited) == 4
    assert all(0 < seconds < 60 for seconds in waited)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [1]


def test_one_rank_alone_looks_for_a_newer_start(rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Observer, "on_step", lambda _, result: seen.append(result.step))
    monkeypatch.setattr(Trainer, "is_first_rank", False)  # as the first rank of another node
    monkeypatch.setattr(Fence, "may_be_ours", lambda _: pytest.fail("read on each node at each step"))
    trainer = rank.trainer(rank.config(tmp_path / "run", "train.steps=2", "train.decay_steps=2"))
    trainer.run([Observer()])
    assert seen == [1, 2]


def test_an_older_start_keeps_unfinished_folders_of_a_newer_one(tmp_path: Path) -> None:
    older = begin_incarnation(tmp_path)
    newer = begin_incarnation(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    for token in (older.token, newer.token, f"{newer.token}.0f0f.old"):
        (checkpoints / f".step_0000001.{token}").mkdir(parents=True)
    remove_unfinished(checkpoints, fence=older)
    assert len(list(checkpoints.iterdir())) == 2, "its own is gone"
    remove_unfinished(checkpoints, fence=newer)
    assert list(checkpoints.iterdir()) == []
    (checkpoints / ".step_0000002").mkdir()
    (checkpoints / ".step_0000002.whatever").mkdir()
    remove_unfinished(checkpoints, fence=newer)
    assert list(checkpoints.iterdir()) == []


def test_a_start_beside_a_live_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incarnation, "EXIT_SECONDS", 0.2)
    code = "import sys\nfrom pathlib import Path\nfrom training.incarnation import begin_incarnation\n"
    code += "begin_incarnation(Path(sys.argv[1]))\nprint('begun', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=f"is being trained by process {other.pid} on this machine since .*STOP"):
            refuse_second_start(tmp_path)
    refuse_second_start(tmp_path)  # it has ended


@pytest.mark.parametrize("change", [{"machine": "another"}, {"process_started": 1}])
def test_a_start_elsewhere_or_with_a_reused_pid_is_no_obstacle(tmp_path: Path, change: dict[str, object]) -> None:
    begin_incarnation(tmp_path)
    file = tmp_path / "incarnation"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refuse_second_start(tmp_path)


def test_a_second_launcher_is_refused_before_the_first_has_ranks(tmp_path: Path) -> None:
    with sole_launcher(tmp_path / "run"), pytest.raises(InputError, match="is being started by another") as refused:
        with sole_launcher(tmp_path / "run"):
            pass
    assert name_run_file(str(refused.value), "my.yaml") == str(refused.value)  # the other may have another run file
    with sole_launcher(tmp_path / "run"):
        pass  # it has ended


def test_lines_of_an_older_start_never_reach_the_newer_metrics(tmp_path: Path) -> None:
    older = MetricsFile(tmp_path, last_step=0)
    older.on_step(step_result(step=1))
    newer = MetricsFile(tmp_path, last_step=1)
    older.on_step(step_result(step=2))  # the newer one started after this one checked the fence
    newer.on_step(step_result(step=2))
    older.on_step(step_result(step=3))
    for file in (older, newer):
        file.close("FINISHED")
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("module", "name"),
    [(MetricsFile, "before_save"), (disk, "make_folder"), (write, "write_manifest")],
    ids=["before the folder is made", "before a file is opened", "before the rename"],
)
def test_a_superseded_save_changes_no_checkpoint(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    """A newer start begins right before each check of the fence during a save."""
    run_dir = tmp_path / "run"
    rank.start(run_dir, steps=2)
    before = contents(run_dir / "checkpoints")
    real = getattr(module, name)

    def superseded(*arguments: object) -> None:
        real(*arguments)
        begin_incarnation(run_dir)

    monkeypatch.setattr(module, name, superseded)
    with pytest.raises(Superseded):
        rank.start(run_dir)
    assert contents(run_dir / "checkpoints") == before
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_an_older_start_ends_before_its_next_step(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, on_step, take = [], MetricsFile.on_step, rank.engine.train_step

    def newer_one_comes(self: MetricsFile, step: StepResult) -> None:
        on_step(self, step)
        begin_incarnation(tmp_path)

    def counted(*arguments: Any, **more: Any) -> StepOutcome:
        steps.append(more["learning_rate"])
        return take(*arguments, **more)

    monkeypatch.setattr(MetricsFile, "on_step", newer_one_comes)
    monkeypatch.setattr(rank.engine, "train_step", counted)
    with pytest.raises(Superseded):
        rank.start(tmp_path, "checkpoint.every=100")
    assert len(steps) == 1


def test_a_superseded_start_leaves_the_mlflow_status_alone(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(MlflowTracker, "start", lambda *_, **__: None)
    monkeypatch.setattr(MlflowTracker, "finish", lambda _, status: ended.append(status))
    observer = TrackingObserver(rank.config(tmp_path), run_dir=tmp_path, certificate=tmp_path / "certificate.json")
    observer.close("SUPERSEDED")
    assert ended == []
    observer.close("KILLED")
    assert ended == ["KILLED"]


def test_two_starts_in_one_folder_end_as_one_run(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer start trains to the end while the older is in its third step."""
    unbroken, run_dir, copy = tmp_path / "unbroken", tmp_path / "run", tmp_path / "copy"
    rank.start(unbroken)
    rank.start(run_dir, steps=2)
    shutil.copytree(run_dir, copy)
    rank.start(copy)  # the state that the newer one leaves
    real = MetricsFile.on_step

    def newer_one_comes(self: MetricsFile, step: StepResult) -> None:
        real(self, step)
        if step.step == 3:
            for path in sorted(copy.rglob("*")):
                target = run_dir / path.relative_to(copy)
                target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)
            shutil.rmtree(run_dir / "checkpoints" / "step_0000001", ignore_errors=True)

    monkeypatch.setattr(MetricsFile, "on_step", newer_one_comes)
    with pytest.raises(Superseded):
        rank.start(run_dir)
    for key in ("step", "loss", "grad_norm"):
        assert [json.loads(line)[key] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [
            json.loads(line)[key] for line in (unbroken / "metrics.jsonl").read_text().splitlines()
        ]
    assert [check_whole(checkpoint.path).step for checkpoint in list_checkpoints(run_dir)][-2:] == [STEPS - 1, STEPS]
