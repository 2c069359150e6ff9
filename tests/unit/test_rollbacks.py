"""`train.rollbacks`: a run that diverges goes back to a checkpoint and on with the samples after the divergence."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.schema import Train
from tests.support.disk import OnOperation, counted_operations, once
from tests.support.diverging import (
    BATCH,
    STEPS,
    Killed,
    Told,
    lines_of,
    losses_given,
    poison_steps,
    results_of,
    train,
    train_without,
)
from tests.support.one_rank import OneRank
from training.checkpoint.manifest import check_whole, list_checkpoints, read_manifest
from training.divergence import BASE_STEPS, SPIKE_STEPS, Diverged, LossWatch
from training.incarnation import begin_incarnation
from training.observers import StepResult
from training.rollbacks import checkpoints_before, read_rollbacks, record_rollback
from training.state import TrainState

TRAIN = Train(micro_batch=1, global_batch=1, steps=9, learning_rate=1.0)


@pytest.fixture
def poison(rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the steps that are launched as the given numbers spoil the weights."""

    def poison(*calls: int) -> None:
        monkeypatch.undo()
        poison_steps(rank, monkeypatch, *calls)

    return poison


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_diverged_run_goes_on_without_the_samples(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None], ahead: int
) -> None:
    run_dir, told = tmp_path / "run", Told()
    poison(5)  # step 6 has no loss
    assert train(rank, run_dir, told=told, ahead=ahead) == TrainState(STEPS, STEPS * BATCH, left_out_samples=3 * BATCH)
    monkeypatch.undo()
    assert told.went_back == [3]
    assert [line["step"] for line in lines_of(run_dir, "logs/metrics_discarded.jsonl")] == [4, 5]
    assert [line.get("rollbacks") for line in lines_of(run_dir)] == [None] * 3 + [1] * 6
    saved = [read_manifest(checkpoint.path) for checkpoint in list_checkpoints(run_dir)]
    assert [(each.step, each.left_out_samples) for each in saved] == [(3, 0), (6, 3 * BATCH), (9, 3 * BATCH)]
    (rollback,) = read_rollbacks(run_dir)
    assert (rollback.step, rollback.next_sample, rollback.left_out) == (3, 3 * BATCH, 3 * BATCH)
    assert rollback.from_step == 6
    assert rollback.why.startswith("the loss is nan and the gradient norm nan at step 6")

    train_without(rank, tmp_path / "without", monkeypatch, first=3 * BATCH, count=3 * BATCH)
    assert results_of(run_dir) == results_of(tmp_path / "without")
    train(rank, tmp_path / "with")
    assert results_of(run_dir) != results_of(tmp_path / "with"), "the samples matter"
    (tmp_path / "copy").mkdir()
    shutil.copy(run_dir / "rollbacks.json", tmp_path / "copy")
    assert train(rank, tmp_path / "copy").left_out_samples == 3 * BATCH
    assert results_of(tmp_path / "copy") == results_of(run_dir), "the record alone repeats it"


def test_weights_that_the_last_step_spoilt_are_no_result(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"
    poison(STEPS)
    with pytest.raises(InputError) as error:
        train(rank, run_dir, "train.rollbacks=0")
    assert str(error.value).startswith(
        f"the loss on the check batch is nan after step {STEPS}, so training has diverged: "
    )
    poison(STEPS - 6)
    assert train(rank, run_dir).left_out_samples == 3 * BATCH
    monkeypatch.undo()
    train_without(rank, tmp_path / "without", monkeypatch, first=6 * BATCH, count=3 * BATCH)
    assert results_of(run_dir) == results_of(tmp_path / "without")


def test_a_kill_after_the_rollback_forgets_nothing(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"

    def kill(result: StepResult) -> None:
        if result.rollbacks and result.step == 5:  # before a checkpoint knows of the samples
            raise Killed

    poison(5)
    with pytest.raises(Killed):
        train(rank, run_dir, told=Told(kill))
    monkeypatch.undo()
    assert [saved.step for saved in list_checkpoints(run_dir)] == [3]
    assert train(rank, run_dir).left_out_samples == 3 * BATCH
    train_without(rank, tmp_path / "without", monkeypatch, first=3 * BATCH, count=3 * BATCH)
    assert results_of(run_dir) == results_of(tmp_path / "without")


def test_a_second_divergence_stops_or_goes_back_again(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"
    poison(4, 7)  # step 4, and when it is taken again the one after it
    with pytest.raises(InputError) as error:
        train(rank, run_dir)
    good = list_checkpoints(run_dir)[-1].path
    assert good.name == "step_0000003"
    assert str(error.value) == (
        "the loss is nan and the gradient norm nan at step 6, so training has diverged again, after 1 rollback: "
        f"`trainshort train --set train.rollbacks=2` goes back to {good}, without the samples since; or in "
        "another run.dir, with a lower train.learning_rate, train.branch_from goes on from there"
    )
    poison(1)
    assert train(rank, run_dir, "train.rollbacks=2").left_out_samples == 4 * BATCH  # two each time
    monkeypatch.undo()
    assert [rollback.left_out for rollback in read_rollbacks(run_dir)] == [2 * BATCH, 4 * BATCH]
    train_without(rank, tmp_path / "without", monkeypatch, first=3 * BATCH, count=4 * BATCH)
    assert results_of(run_dir) == results_of(tmp_path / "without")


def test_a_broken_checkpoint_is_no_place_to_go_back_to(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"

    def damage(result: StepResult) -> None:
        if result.step == 7:
            next(list_checkpoints(run_dir)[-1].path.glob("*.exp_avg.safetensors")).unlink()

    poison(7)
    assert train(rank, run_dir, told=Told(damage)).left_out_samples == 5 * BATCH
    monkeypatch.undo()
    assert [rollback.step for rollback in read_rollbacks(run_dir)] == [3]
    train_without(rank, tmp_path / "without", monkeypatch, first=3 * BATCH, count=5 * BATCH)
    assert results_of(run_dir) == results_of(tmp_path / "without")


def test_a_branch_goes_back_to_its_trunk(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None]
) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    train(rank, trunk)
    poison(1)
    end = train(rank, branch, f"train.branch_from={trunk}/checkpoints/step_0000003")
    monkeypatch.undo()
    assert end == TrainState(STEPS, STEPS * BATCH, left_out_samples=2 * BATCH)
    train_without(rank, tmp_path / "without", monkeypatch, first=3 * BATCH, count=2 * BATCH)
    figures, hashes = results_of(tmp_path / "without")
    assert results_of(branch) == (figures[3:], hashes)
    # a branch of the branch knows what was left out
    again = train(rank, tmp_path / "again", f"train.branch_from={branch}/checkpoints/step_0000006")
    assert again.left_out_samples == 2 * BATCH
    assert results_of(tmp_path / "again") == (figures[6:], hashes)


def test_a_spike_removes_what_was_saved_in_it(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, told = tmp_path / "run", Told()
    losses_given(rank, monkeypatch, lambda number: 4.0 if 13 < number <= 23 else 2.0)
    end = train(rank, run_dir, "train.spike=1.5", told=told, steps=24)
    assert told.went_back == [12], "the checkpoints of steps 15, 18 and 21 are of the spike"
    assert end == TrainState(24, 24 * BATCH, left_out_samples=11 * BATCH)
    assert [line["loss"] for line in lines_of(run_dir)] == [2.0] * 24
    (rollback,) = read_rollbacks(run_dir)
    assert rollback.why == (
        "the loss is 4.0000 at step 23: 10 in a row lie more than train.spike (1.5) above 2.0000, the mean of the 13 "
        "before"
    )
    assert (
        f"ROLLED BACK (1 of 1): {rollback.why}; training goes back to {run_dir}/checkpoints/step_0000012 and leaves "
        "out the 44 samples since then; removed what was saved in between: step_0000015, step_0000018, step_0000021"
    ) in caplog.text


def test_a_disk_that_fails_in_a_rollback_loses_nothing(rank: OneRank, tmp_path: Path) -> None:
    train(rank, tmp_path / "run")

    config = rank.config(tmp_path / "run", "train.rollbacks=1")

    def rolled_back(run_dir: Path, fails: OnOperation = lambda number, name: None) -> int:
        diverged = Diverged("the loss is nan", began=5, state=TrainState(10, 10 * BATCH))
        (good,) = checkpoints_before(diverged, train=config.train, run_dir=run_dir)
        with counted_operations(fails) as operations:
            record_rollback(diverged, good, read_manifest(good), train=config.train, fence=begin_incarnation(run_dir))
        return len(operations)

    operations = rolled_back(shutil.copytree(tmp_path / "run", tmp_path / "whole"))
    assert operations > 10
    for number in range(1, operations + 1):
        run_dir = shutil.copytree(tmp_path / "run", tmp_path / f"fails_{number}")
        with pytest.raises(OSError, match="Input/output error"):
            rolled_back(run_dir, once(number))
        for saved in list_checkpoints(run_dir):
            check_whole(saved.path)
        if not read_rollbacks(run_dir):
            rolled_back(run_dir)
        assert [saved.step for saved in list_checkpoints(run_dir)] == [3]
        assert [(each.step, each.left_out) for each in read_rollbacks(run_dir)] == [(3, 7 * BATCH)]


def test_a_start_in_a_spike_sees_it_at_the_same_step(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def kill(result: StepResult) -> None:
        if result.step == 19:
            raise Killed

    losses_given(rank, monkeypatch, lambda number: 4.0 if number > 13 else 2.0)
    with pytest.raises(Killed):
        train(rank, run_dir, "train.spike=1.5", told=Told(kill), steps=24)
    monkeypatch.undo()
    losses_given(rank, monkeypatch, lambda number: 4.0)
    with pytest.raises(
        InputError, match=r"^the loss is 4.0000 at step 23: .* so training has diverged: .*=1` goes back"
    ):
        train(rank, run_dir, "train.spike=1.5", "train.rollbacks=0", steps=24)
    assert read_rollbacks(run_dir) == []
    assert [saved.step for saved in list_checkpoints(run_dir)] == [3, 6, 9, 12, 15, 18, 21]


def test_only_a_lasting_rise_is_a_spike() -> None:
    def first_seen(losses: list[float], *, rise: float | None = 1.0, short: int = 0) -> tuple[int, int] | None:
        watch = LossWatch(TRAIN.model_copy(update={"spike": rise, "length_warmup": ((4, short),) * (short > 0)}))
        for step, loss in enumerate(losses, start=1):
            try:
                watch.check(TrainState(step, step), loss=loss, grad_norm=1.0)
            except Diverged as diverged:
                return diverged.began, diverged.state.step
        return None

    level, high = [3.0] * 40, 4.5
    assert first_seen([*level, *[high] * SPIKE_STEPS]) == (41, 50)
    assert first_seen([*level, *[high] * (SPIKE_STEPS - 1), 3.9, *[high] * (SPIKE_STEPS - 1)]) is None
    assert first_seen([*level, *[4.0] * 50]) is None, "no more than the rise"
    assert first_seen([*level, *[high] * SPIKE_STEPS], rise=None) is None
    assert first_seen([3.0 + 0.01 * step for step in range(300)]) is None, "a slow rise"
    assert first_seen([9.0 - 0.02 * step for step in range(300)]) is None
    assert first_seen([*[3.0] * (SPIKE_STEPS - 1), *[high] * 50]) == (11, 20), "ten are needed before"
    # the mean is that of the hundred before
    assert first_seen([*[9.0] * 50, *[3.0] * BASE_STEPS, *[high] * SPIKE_STEPS]) == (151, 160)
    # longer sequences have losses of their own
    assert first_seen([*level, *[high] * 50], short=40) is None
    assert first_seen([*level, *[3.0] * SPIKE_STEPS, *[high] * SPIKE_STEPS], short=40) == (51, 60)
    for loss, grad_norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        with pytest.raises(Diverged):
            LossWatch(TRAIN).check(TrainState(1, 1), loss=loss, grad_norm=grad_norm)


@pytest.mark.parametrize("content", ["{", "[]", '{"rollbacks": [{"step": 3}]}', '{"rollbacks": [{"step": "x"}]}'])
def test_a_damaged_record_is_named(rank: OneRank, tmp_path: Path, content: str) -> None:
    run_dir = tmp_path / "run"
    train(rank, run_dir, steps=3)
    (run_dir / "rollbacks.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{run_dir}/rollbacks.json is damaged \(.*\): repair it, or move it away;"):
        train(rank, run_dir, steps=3)
