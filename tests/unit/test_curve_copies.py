"""Curves for other trackers: each step once over several commands, steps that are taken again, and evaluations."""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from launch import copies
from launch.copies import copy_curves
from tests.support.command_line import Call
from tests.support.compared_runs import add_report, make_run, replace_lines
from tests.support.run_folders import start_run
from training.curves.copied import Copied
from training.curves.copy import CurveCopy, Evaluation
from training.curves.trackers import TRACKERS, TrackerRow
from training.incarnation import begin_incarnation
from training.tracking.ending import Ending
from training.tracking.record import RunRecord, write_record


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[list[Evaluation]] = []
        self.flushed = self.closed = 0

    def start(self, *, first_step: int) -> None:
        self.firsts.append(first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, dict(values)))

    def write_evaluations(self, evaluations: Sequence[Evaluation]) -> None:
        self.evaluations.append([*evaluations])

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1

    @property
    def written(self) -> list[int]:
        return [step for step, _ in self.steps]


def copied(run_dir: Path) -> Recorder:
    """Copy a run by a command of its own."""
    recorder = Recorder()
    with CurveCopy(run_dir, "tensorboard") as copy:
        copy.update(recorder)
    return recorder


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_copied_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my")
    first = copied(run_dir)
    assert (first.firsts, first.written) == ([1], [*range(1, 11)])
    step, values = first.steps[4]
    assert step == 5
    assert values["train/loss"] == 4.5
    assert values["validation/loss"] == pytest.approx(3.7)
    assert values["memory/peak_gb"] == 1.5
    assert "time/model_flops_utilization" not in values, "null on a CPU that is not known"
    lines = lines_of(run_dir)
    more = [
        {**lines[-1], "step": step, "loss": float("nan"), "tokens_seen": 10**400, "of a later version": 1}
        for step in (11, 12)
    ]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in more) + '{"step": 13, "lo')
    second = copied(run_dir)
    assert (second.firsts, second.written) == ([11], [11, 12])
    assert "train/loss" not in second.steps[0][1]
    assert copied(run_dir).steps == []


def test_steps_that_are_taken_again_are_copied_again(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my")
    lines, recorder = lines_of(run_dir), Recorder()
    with CurveCopy(run_dir, "tensorboard") as copy:
        for count in (4, 6, 10):
            replace_lines(run_dir, lines[:count])
            copy.update(recorder)
        assert recorder.written == [*range(1, 11)]
        # a start that goes on from step 5, whose first step has another loss
        replace_lines(run_dir, [*lines[:5], {**lines[5], "loss": 9.0}])
        copy.update(recorder)
        assert recorder.firsts == [1, 5, 7, 5]
        assert recorder.written[10:] == [5, 6]
        assert recorder.steps[-1][1]["train/loss"] == 9.0
    assert copied(run_dir).firsts == [7]
    replace_lines(run_dir, [{**lines[0], "loss": 8.0}])
    again = copied(run_dir)
    assert (again.firsts, again.written) == ([1], [1])


def test_a_file_replaced_twice_is_read_again(tmp_path: Path) -> None:
    run_dir, recorder = make_run(tmp_path / "my"), Recorder()
    lines = lines_of(run_dir)
    with CurveCopy(run_dir, "tensorboard") as copy:
        replace_lines(run_dir, lines[:6])
        inode = (run_dir / "metrics.jsonl").stat().st_ino
        copy.update(recorder)
        again = [*lines[:5], *({**line, "loss": 9.0} for line in lines[5:])]
        for _ in range(8):  # until the inode comes back, which most file systems reuse
            replace_lines(run_dir, again)
            if (run_dir / "metrics.jsonl").stat().st_ino == inode:
                break
        copy.update(recorder)
    assert [values["train/loss"] for step, values in recorder.steps if step >= 6] == [4.4, *[9.0] * 5]


def test_a_run_before_its_first_step_is_followed(tmp_path: Path) -> None:
    run_dir, recorder = make_run(tmp_path / "my"), Recorder()
    lines = lines_of(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    with CurveCopy(run_dir, "tensorboard") as copy:
        assert copy.update(recorder) == 0
        replace_lines(run_dir, lines)
        assert copy.update(recorder) == 10
    assert recorder.flushed == 2
    assert recorder.firsts == [1, 1]


def test_evaluations_are_copied_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my", checkpoints=(5, 10))
    add_report(run_dir, {32: 21.0, 64: 20.5})
    (first,) = copied(run_dir).evaluations
    assert [(each.step, each.is_new) for each in first] == [(10, True)]
    assert first[0].values["evaluation/held-out/nonoverlapping/64/perplexity"] == 20.5
    add_report(run_dir, {32: 30.0}, step=5, newest=False)
    (second,) = copied(run_dir).evaluations
    assert [(each.step, each.is_new) for each in second] == [(5, True), (10, False)]
    assert copied(run_dir).evaluations == []
    add_report(run_dir, {32: 19.0})
    (third,) = copied(run_dir).evaluations
    assert [(each.step, each.is_new) for each in third] == [(5, False), (10, True)]


def test_only_reports_on_the_run_are_copied(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my", checkpoints=(5, 10))
    (run_dir / "evaluation" / "hf-other").mkdir(parents=True)
    (run_dir / "evaluation" / "step_0000003").mkdir()
    (run_dir / "evaluation" / "step_0000003" / "report.json").write_text("{")
    other = add_report(run_dir, {32: 99.0}, step=0)
    other.rename(run_dir / "evaluation" / "hf-other" / other.name)
    old = add_report(run_dir, {32: 30.0}, step=5)
    old.rename(old.with_name("report.json"))  # as version 0.1.0 named it
    add_report(run_dir, {32: 21.0}, text="gone.txt").unlink()
    replaced = run_dir / "evaluation" / "step_0000010" / "gone.json"
    replaced.symlink_to("nothing")
    (evaluations,) = copied(run_dir).evaluations
    assert [each.step for each in evaluations] == [5]
    assert evaluations[0].values["evaluation/held-out/nonoverlapping/32/perplexity"] == 30.0


def test_marks_of_a_long_run_become_few() -> None:
    copied = Copied()
    lines = [b'{"step": %d}\n' % step for step in range(1, 100_001)]
    for step in range(20, 100_001, 20):
        copied.mark(step, lines[step - 1])
        assert len(copied.marks) <= 1024
    # a day of marks every half minute are 2880: at each, little is copied again
    for count in range(100_000, 50_000, -5000):
        assert count - Copied([*copied.marks]).forget_after(lines[:count]) <= (100_000 - count) / 10 + 20
    assert copied.forget_after(lines[:50]) == 20
    assert copied.forget_after(lines[:10]) == 0


def test_a_long_copy_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recorder = make_run(tmp_path / "my"), Recorder()
    monkeypatch.setattr("training.curves.copy.STEPS_PER_MARK", 4)
    monkeypatch.setattr(recorder, "write_evaluations", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    add_report(run_dir, {32: 21.0})
    with CurveCopy(run_dir, "tensorboard") as copy, pytest.raises(KeyboardInterrupt):
        copy.update(recorder)
    again = copied(run_dir)
    assert (again.firsts, again.written) == ([9], [9, 10])
    lines = lines_of(run_dir)
    replace_lines(run_dir, [*lines[:6], {**lines[6], "loss": 9.0}])  # a start from step 6
    assert copied(run_dir).written == [5, 6, 7]


def test_the_id_is_kept_before_it_is_used(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my")
    with CurveCopy(run_dir, "wandb") as copy:
        first = copy.tracker_id()
        copy.update(Recorder())
    shutil.copytree(run_dir, tmp_path / "copy")
    with CurveCopy(run_dir, "wandb") as copy, CurveCopy(tmp_path / "copy", "wandb") as other:
        assert copy.tracker_id() == first
        assert other.copied.newest_step == 0, "a copy of the run folder begins a run of its own there"
        assert other.tracker_id() != first
    run_dir.rename(tmp_path / "moved")
    with CurveCopy(tmp_path / "moved", "wandb") as copy:
        assert (copy.tracker_id(), copy.copied.newest_step) == (first, 10)


def test_a_damaged_state_begins_again(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my")
    copied(run_dir)
    for text in ("", "[]", '{"marks": [[1]], "reports": {}, "run_id": null}', '{"marks": 3}'):
        (run_dir / "tensorboard" / "copied.json").write_text(text)
        assert copied(run_dir).firsts == [1]


def test_copies_go_on_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recorder, told = make_run(tmp_path / "my"), Recorder(), list[tuple[Path, int]]()
    lines = lines_of(run_dir)
    replace_lines(run_dir, lines[:3])
    begin_incarnation(run_dir)
    rounds = iter((lines[:3], lines[:8], lines))
    ends = iter((None, None, None, Ending("FINISHED", 0)))
    monkeypatch.setattr(copies, "ending_of", lambda _: next(ends))
    monkeypatch.setattr(copies.time, "sleep", lambda _: replace_lines(run_dir, next(rounds)))
    row = TrackerRow("tensorboard", lambda copy, project: recorder)
    keys = {"tracker": row, "project": "p", "every": 5.0}
    copy_curves([run_dir], **keys, on_copied=lambda *copied: told.append(copied))  # type: ignore[arg-type]
    assert told == [(run_dir, 3), (run_dir, 5), (run_dir, 2)]
    assert recorder.written == [*range(1, 11)]
    assert recorder.closed == 1


def test_a_run_that_was_never_started_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recorder = make_run(tmp_path / "average"), Recorder()
    monkeypatch.setattr(copies.time, "sleep", lambda _: pytest.fail("it waits for an average to end"))
    row = TrackerRow("tensorboard", lambda copy, project: recorder)
    copy_curves([run_dir], tracker=row, project="p", every=5.0, on_copied=lambda *_: None)
    assert recorder.written == [*range(1, 11)]


def test_an_end_on_another_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recorder = start_run(make_run(tmp_path / "my"), machine="another", host="node7"), Recorder()
    write_record(run_dir, RunRecord("id", None, is_open=True))
    rounds = iter((RunRecord("id", None, is_open=True), RunRecord("id", None)))
    monkeypatch.setattr(copies.time, "sleep", lambda _: write_record(run_dir, next(rounds)))
    row = TrackerRow("tensorboard", lambda copy, project: recorder)
    copy_curves([run_dir], tracker=row, project="p", every=5.0, on_copied=lambda *_: None)
    assert (recorder.flushed, next(rounds, None)) == (3, None)


def test_a_run_that_is_removed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recorder = start_run(make_run(tmp_path / "my")), Recorder()
    monkeypatch.setattr(copies.time, "sleep", lambda _: shutil.rmtree(run_dir))
    row = TrackerRow("tensorboard", lambda copy, project: recorder)
    copy_curves([run_dir], tracker=row, project="p", every=5.0, on_copied=lambda *_: None)
    assert (recorder.firsts, recorder.closed, run_dir.exists()) == ([1], 1, False)


def test_no_copy_begins_if_a_folder_is_refused(tmp_path: Path) -> None:
    row = TrackerRow("tensorboard", lambda copy, project: pytest.fail("a run begins at the tracker"))
    with pytest.raises(InputError, match="is no run folder"):
        copy_curves([make_run(tmp_path / "my"), tmp_path], tracker=row, project="p", every=None, on_copied=print)


def test_a_full_disk_is_said_and_copied_later(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run_dir, recorder = make_run(tmp_path / "my"), Recorder()
    recorder.flush = full  # type: ignore[method-assign]
    with CurveCopy(run_dir, "tensorboard") as copy, pytest.raises(MachineError, match="No space left .*: free space"):
        copy.update(recorder)
    assert copied(run_dir).written == [*range(1, 11)]


class FullDisk(Recorder):
    """A tracker whose disk is full for the first rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self._rounds = rounds

    def flush(self) -> None:
        super().flush()
        if self.flushed <= self._rounds:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_run_that_fails_keeps_no_other_back(
    tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path / name) for name in ("full", "good")]
    writers: dict[str, Recorder] = {"full": FullDisk(1), "good": Recorder()}
    row = TrackerRow("tensorboard", lambda copy, project: writers[copy.run_dir.name])
    monkeypatch.setattr("launch.commands.track.require_tracker", lambda _: row)
    command = ("track", "copy", *map(str, folders), "--to", "tensorboard")
    answer = trainshort(*command)
    assert (answer.code, answer.out) == (3, f"{folders[1]}: copied 10 records to tensorboard\n")
    assert answer.error == (
        f"error: {folders[0]} cannot be copied to {folders[0]}/tensorboard (No space left on device): free space or "
        "fix permissions, and run the command again\n"
    )
    assert trainshort(*command).code == 0
    assert [writer.written for writer in writers.values()] == [[*range(1, 11)] * 2, [*range(1, 11)]]


@pytest.mark.parametrize(("rounds", "code"), [(2, 0), (9, 3)])
def test_a_run_that_fails_is_tried_until_it_has_ended(
    tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch, rounds: int, code: int
) -> None:
    folders = [make_run(tmp_path / name) for name in ("full", "good")]
    writers: dict[str, Recorder] = {"full": FullDisk(rounds), "good": Recorder()}
    lines, row = lines_of(folders[0]), TrackerRow("tensorboard", lambda copy, project: writers[copy.run_dir.name])
    replace_lines(folders[0], lines[:3])
    begin_incarnation(folders[0])
    ends = iter((None, None, None, Ending("FINISHED", 0)))
    monkeypatch.setattr("launch.commands.track.require_tracker", lambda _: row)
    monkeypatch.setattr(copies, "ending_of", lambda _: next(ends))
    monkeypatch.setattr(copies.time, "sleep", lambda _: replace_lines(folders[0], lines))
    answer = trainshort("track", "copy", *map(str, folders), "--to", "tensorboard", "--every", "5")
    assert (answer.code, answer.error.count("until it has ended, it is tried again every 5 s\n")) == (code, 1)
    assert answer.error.count("error: ") == (code > 0)
    # each time from the first step, since nothing is known to be there
    assert writers["full"].firsts[: rounds + 1] == [1] * min(rounds + 1, 4)
    assert writers["full"].written[-10:] == [*range(1, 11)]


def test_a_damaged_step_hides_no_later_ones(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my")
    lines = lines_of(run_dir)
    replace_lines(run_dir, [*lines[:3], {**lines[3], "step": 4_000_000}])
    assert copied(run_dir).written == [1, 2, 3, 4_000_000]
    replace_lines(run_dir, [*lines[:3], {**lines[3], "step": 4_000_000}, *lines[4:]])
    assert copied(run_dir).written == [*range(5, 11)]
    assert copied(run_dir).written == []


def test_a_full_disk_under_a_thread_prints_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        """Writes in a thread, as TensorBoard does, and raises what that has met."""

        def __init__(self, folder: str, *, purge_step: int) -> None:
            self.add_text = self.add_scalar = self.close = lambda *_: None

        def flush(self) -> None:
            writing = threading.Thread(target=self._write)
            writing.start()
            writing.join()
            self._write()

        def _write(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fake, name = ModuleType("torch.utils.tensorboard"), "training.curves.tensorboard"
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, name, raising=False)
    told = list[object]()
    monkeypatch.setattr(threading, "excepthook", told.append)
    with CurveCopy(make_run(tmp_path / "my"), "tensorboard") as copy:
        writer = TRACKERS["tensorboard"].open(copy, "p")
        with pytest.raises(MachineError, match="No space left"):
            copy.update(writer)
        assert told == []
        bug = threading.Thread(target=int, args=("x",))
        bug.start()
        bug.join()
        writer.close()
    assert (len(told), threading.excepthook) == (1, told.append)
    del sys.modules[name]


def test_what_cannot_be_copied_is_refused(tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "my")
    with pytest.raises(InputError, match="is no run folder: name the folder of a run that has started"):
        CurveCopy(tmp_path, "tensorboard")
    (tmp_path / "config.yaml").write_text("{{")
    with pytest.raises(InputError, match="config.yaml is not the run file of a start .is not YAML"):
        CurveCopy(tmp_path, "tensorboard")
    with CurveCopy(run_dir, "tensorboard"), pytest.raises(MachineError, match="another process copies"):
        CurveCopy(run_dir, "tensorboard")
    unknown = trainshort("track", "copy", str(run_dir), "--to", "paper")
    assert (unknown.code, unknown.error) == (2, "error: --to 'paper' is not known: use tensorboard or wandb\n")
    monkeypatch.setattr("training.curves.trackers.find_spec", lambda _: None)
    for name in TRACKERS:
        refused = trainshort("track", "copy", str(run_dir), "--to", name)
        assert refused.code == 3
        assert refused.error == f"error: {name} is not installed: run pip install 'trainshort[{name}]'\n"
