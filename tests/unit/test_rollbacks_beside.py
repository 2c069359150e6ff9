"""Rollbacks beside what else may happen: a second start, a trunk that went back, exports, retention, MLflow."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from tests.support.diverging import (
    BATCH,
    Killed,
    Told,
    lines_of,
    losses_given,
    poison_steps,
    results_of,
    train,
    train_without,
)
from tests.support.one_rank import OneRank, one_rank
from tests.support.steps import step_result
from training import trainer as training_trainer
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.retention import remove_after
from training.incarnation import Superseded, begin_incarnation
from training.metrics_file import MetricsFile
from training.observers import StepResult
from training.rollbacks import last_step_taken_again, read_rollbacks, rollbacks_of
from training.state import TrainState


def flip_last_byte(folder: Path) -> None:
    """Alter a checkpoint so that its size stays."""
    file = next(folder.glob("*.exp_avg.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_start_that_was_overtaken_touches_nothing(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, told, real = tmp_path / "run", Told(), training_trainer.go_back
    poison_steps(rank, monkeypatch, 5)

    def overtaken(*arguments: Any, **more: Any) -> TrainState:
        start = real(*arguments, **more)
        begin_incarnation(run_dir)
        newer = MetricsFile(run_dir, last_step=3)
        newer.on_step(step_result(step=4))
        newer.close("KILLED")
        return start

    monkeypatch.setattr(training_trainer, "go_back", overtaken)
    with pytest.raises(Superseded):
        train(rank, run_dir, told=told)
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3, 4]
    assert told.went_back == []
    fence = begin_incarnation(run_dir)
    begin_incarnation(run_dir)
    with pytest.raises(Superseded):
        remove_after(0, fence=fence)
    assert [saved.step for saved in list_checkpoints(run_dir)] == [3]


def test_a_branch_leaves_out_what_its_trunk_left_out(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    poison_steps(rank, monkeypatch, 5)
    train(rank, trunk)
    monkeypatch.undo()
    end = train(rank, branch, f"train.branch_from={trunk}/checkpoints/step_0000003")
    assert end.left_out_samples == 3 * BATCH
    figures, hashes = results_of(trunk)
    assert results_of(branch) == (figures[3:], hashes)
    assert read_rollbacks(branch) == [], "the trunk's do not count"
    assert not any("rollbacks" in line for line in lines_of(branch))
    # what it inherited stays, whatever becomes of the trunk; and a branch of the branch has it too
    second, trunk_too = tmp_path / "second", tmp_path / "link"
    trunk_too.symlink_to(branch / "checkpoints" / "step_0000006")
    shutil.rmtree(trunk)
    (branch / "checkpoints" / "step_0000009").rename(tmp_path / "gone")
    assert train(rank, branch, f"train.branch_from={trunk}/checkpoints/step_0000003").left_out_samples == 3 * BATCH
    assert train(rank, second, f"train.branch_from={trunk_too}").left_out_samples == 3 * BATCH
    assert results_of(second) == (figures[6:], hashes)
    assert rollbacks_of(second) == rollbacks_of(branch) != []


def test_nothing_is_removed_before_a_checkpoint_proves_whole(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def damage(result: StepResult) -> None:
        if result.step == 22:
            flip_last_byte(next(saved.path for saved in list_checkpoints(run_dir) if saved.step == 12))

    losses_given(rank, monkeypatch, lambda number: 4.0 if number > 13 else 2.0)
    with pytest.raises(InputError, match="^the loss is 4.0000 .*, and cannot go back: .*step_0000012/.* was altered"):
        train(rank, run_dir, "train.spike=1.5", "checkpoint.every=12", told=Told(damage), steps=30)
    assert [saved.step for saved in list_checkpoints(run_dir)] == [12], "nothing was saved in the spike"
    monkeypatch.undo()
    poison_steps(rank, monkeypatch, 10)
    run_dir = tmp_path / "older"

    def damage_newest(result: StepResult) -> None:
        if result.step == 10 and not result.rollbacks:
            flip_last_byte(list_checkpoints(run_dir)[-1].path)

    assert train(rank, run_dir, told=Told(damage_newest), steps=12).left_out_samples == 5 * BATCH
    assert [rollback.step for rollback in read_rollbacks(run_dir)] == [6]
    for saved in list_checkpoints(run_dir):
        check_whole(saved.path)


def test_a_checkpoint_from_before_a_spike_is_kept(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, told = tmp_path / "run", Told()
    losses_given(rank, monkeypatch, lambda number: 4.0 if 20 < number <= 30 else 2.0)
    end = train(rank, run_dir, "train.spike=1.5", "checkpoint.every=2", "checkpoint.keep=1", told=told, steps=40)
    assert (end.step, len(told.went_back)) == (40, 1)
    assert 10 <= told.went_back[0] <= 20
    assert [saved.step for saved in list_checkpoints(run_dir)] == [30, 32, 34, 36, 38, 40]


def test_a_branch_sees_a_rise_above_its_trunk(rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    losses_given(rank, monkeypatch, lambda number: 2.0)
    train(rank, trunk, steps=24)
    monkeypatch.undo()
    losses_given(rank, monkeypatch, lambda number: 9.0)
    keys = (f"train.branch_from={trunk}/checkpoints/step_0000021", "train.spike=1", "train.rollbacks=0")
    with pytest.raises(InputError, match=r"^the loss is 9.0000 at step 31: .* above 2.0000, the mean of the 21"):
        train(rank, branch, *keys, steps=40)


def test_a_branch_of_other_lengths_forgets_its_trunks_losses(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    losses_given(rank, monkeypatch, lambda number: 2.0)
    train(rank, trunk, "train.length_warmup=[[4, 99]]", steps=24)
    monkeypatch.undo()
    losses_given(rank, monkeypatch, lambda number: 9.0)
    keys = (f"train.branch_from={trunk}/checkpoints/step_0000021", "train.spike=1", "train.rollbacks=0")
    assert train(rank, branch, *keys, steps=40).step == 40, "each of its steps has the full length, none of the trunk's"


def test_steps_that_are_taken_again_are_known_after_a_kill(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def kill(result: StepResult) -> None:
        if result.rollbacks:
            raise Killed

    assert last_step_taken_again(tmp_path) == 0
    poison_steps(rank, monkeypatch, 5)
    with pytest.raises(Killed):
        train(rank, run_dir, told=Told(kill))
    assert last_step_taken_again(run_dir) == 6


def test_evaluations_of_removed_checkpoints_are_renamed(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    for name in ("step_0000012", "step_0000015"):
        (run_dir / "evaluation" / name).mkdir(parents=True)
    losses_given(rank, monkeypatch, lambda number: 4.0 if 13 < number <= 23 else 2.0)
    train(rank, run_dir, "train.spike=1.5", steps=24)
    kept, renamed = sorted(path.name for path in (run_dir / "evaluation").iterdir())
    assert (kept, renamed.partition(".until-")[0]) == ("step_0000012", "step_0000015")
    assert ".until-" in renamed


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_offloaded_gradients_of_a_divergence_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    (tmp_path / "home").mkdir()
    with one_rank(tmp_path / "home", f"train.precision={precision}", "parallel.offload=cpu") as offloaded:
        with monkeypatch.context() as patch:
            poison_steps(offloaded, patch, 5)
            train(offloaded, tmp_path / "run")
        train_without(offloaded, tmp_path / "without", monkeypatch, first=3 * BATCH, count=3 * BATCH)
        assert results_of(tmp_path / "run") == results_of(tmp_path / "without")
