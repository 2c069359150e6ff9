"""Steps that are launched before the result of the one before is read, as on a GPU, and the batches read ahead."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.step_sizes import StepSize
from data_pipeline.loader import Loader
from data_pipeline.reading_ahead import reading_ahead
from parallel.axes import Group
from parallel.engine import StepOutcome
from tests.support.diverging import Killed, lines_of
from tests.support.one_rank import CPU, OneRank
from tests.support.watched_steps import watching
from training.checkpoint.manifest import list_checkpoints
from training.metrics_file import MetricsFile
from training.observers import Observer, StepResult
from training.state import TrainState
from training.validator import Validation, Validator

STEPS, FOUR = 7, StepSize(4, 8)


class Told(Observer):
    """Keeps the steps that were reported, and calls a function at each."""

    def __init__(self, then: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[int] = []
        self._then = then

    def on_step(self, result: StepResult) -> None:
        self.steps.append(result.step)
        self._then(result.step)


def train(
    rank: OneRank, run_dir: Path, *more: str, observers: list[Observer] | None = None, steps_ahead: int = 1
) -> TrainState:
    """Train as a GPU rank would: a step is launched before the result of the one before is read."""
    config = rank.config(
        run_dir, f"train.steps={STEPS}", f"train.decay_steps={STEPS}", "checkpoint.every=3", "checkpoint.keep=9", *more
    )
    trainer = replace(rank.trainer(config), steps_ahead=steps_ahead)
    return trainer.run([MetricsFile(run_dir, last_step=trainer.start.step), *(observers or [])])


def launched(rank: OneRank, monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> list[int]:
    """Count the steps that are launched, and call a function before each."""
    real, steps = type(rank.engine).train_step, [0]

    def train_step(*arguments: Any, **more: Any) -> StepOutcome:
        steps[0] += 1
        then(steps[0])
        return real(*arguments, **more)

    monkeypatch.setattr(type(rank.engine), "train_step", train_step)
    return steps


def test_late_results_are_those_of_results_read_at_once(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    steps = launched(rank, monkeypatch, lambda step: None)
    told = Told(lambda step: ahead.append(steps[0] - step))
    assert train(rank, tmp_path / "late", observers=[told]).step == STEPS
    assert told.steps == list(range(1, STEPS + 1))
    # none is launched before the saves after steps 3, 6 and 7
    assert ahead == [1, 1, 0, 1, 1, 0, 0]
    train(rank, tmp_path / "at_once", steps_ahead=0)
    late, at_once = lines_of(tmp_path / "late"), lines_of(tmp_path / "at_once")
    for key in ("step", "loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert [line[key] for line in late] == [line[key] for line in at_once]
    assert [saved.step for saved in list_checkpoints(tmp_path / "late")] == [3, 6, 7]


def test_ranks_with_states_of_their_own_draw_other_dropout(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(_: int) -> None:
        raise Killed

    def seed(run_dir: Path, *, tensor_rank: int, sequence: bool) -> int:
        trainer = rank.trainer(rank.config(run_dir, "train.decay_steps=9"))
        parallel = trainer.config.parallel.model_copy(update={"sequence": sequence})
        tensor = Group(rank=tensor_rank, size=2, handle=trainer.groups.tensor.handle)
        config = trainer.config.model_copy(update={"parallel": parallel})
        with pytest.raises(Killed):
            replace(trainer, config=config, groups=replace(trainer.groups, tensor=tensor)).run([])
        return torch.initial_seed()

    launched(rank, monkeypatch, end)
    runs = [(tensor_rank, sequence) for sequence in (False, True) for tensor_rank in (0, 1)]
    first, again = (
        [seed(tmp_path / f"{start}{tensor}{split}", tensor_rank=tensor, sequence=split) for tensor, split in runs]
        for start in ("one", "two")
    )
    assert first == again, "a start of its own draws the same"
    whole, other_whole, part, other_part = first
    assert whole == other_whole, "the tensor ranks drop the same elements of whole states"
    assert part != other_part, "and others where each has a part"


def test_a_validation_sees_no_later_step(rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, validated = launched(rank, monkeypatch, lambda step: None), []
    monkeypatch.setattr(Validator, "is_due", lambda self, step: step % 2 == 0)
    measured = Validation(1.5, {}, {})
    monkeypatch.setattr(Validator, "measure", lambda self: validated.append(steps[0]) or measured)
    train(rank, tmp_path / "run")
    assert validated == [2, 4, 6]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "validation_loss" in line] == [2, 4, 6]


@pytest.mark.parametrize("diverged", [2, 3, 5, STEPS])
def test_a_late_nan_names_its_step_and_is_never_saved(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diverged: int
) -> None:
    real, steps = type(rank.engine).train_step, [0]

    def train_step(*arguments: Any, **more: Any) -> StepOutcome:
        outcome, steps[0] = real(*arguments, **more), steps[0] + 1
        return StepOutcome(torch.tensor(math.nan), outcome.grad_norm) if steps[0] == diverged else outcome

    monkeypatch.setattr(type(rank.engine), "train_step", train_step)
    with pytest.raises(InputError, match=f"^the loss is nan and the gradient norm .* at step {diverged}, so training"):
        train(rank, tmp_path / "run")
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, diverged))
    assert [saved.step for saved in list_checkpoints(tmp_path / "run")] == [s for s in (3, 6) if s < diverged]


def test_a_stop_ends_with_the_step_in_the_queue(rank: OneRank, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def stop(step: int) -> None:
        if step == 4:
            (run_dir / "STOP").touch()

    assert train(rank, run_dir, observers=[Told(stop)]).step == 5
    assert [saved.step for saved in list_checkpoints(run_dir)] == [3, 5]
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3, 4, 5]
    assert train(rank, run_dir).step == STEPS
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, STEPS + 1))


def test_a_kill_between_two_steps_loses_and_repeats_none(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(step: int) -> None:
        if step == 6:
            raise Killed  # step 5 is launched, and its result not read

    launched(rank, monkeypatch, kill)
    with pytest.raises(Killed):
        train(rank, tmp_path / "run")
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]
    monkeypatch.undo()
    assert train(rank, tmp_path / "run").step == STEPS
    train(rank, tmp_path / "whole", steps_ahead=0)
    killed, whole = lines_of(tmp_path / "run"), lines_of(tmp_path / "whole")
    assert [(line["step"], line["loss"]) for line in killed] == [(line["step"], line["loss"]) for line in whole]


def test_no_step_waits_for_the_device_before_it_is_read(rank: OneRank, tmp_path: Path) -> None:
    with watching(rank.engine) as watch:
        assert int(torch.tensor(1)) == 1
        assert watch.steps[0].reads == 1, "it sees them"
        train(rank, tmp_path / "run", "checkpoint.every=100")
    between = watch.steps[1:STEPS]  # without the start and the save at the end
    assert [(step.reads, step.collectives) for step in between] == [(0, [])] * (STEPS - 1)


def test_batches_are_read_ahead_and_are_those_of_the_loader(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, real = rank.loader(rank.config(tmp_path / "run")), Loader.step
    asked: dict[tuple[int, int], str] = {}
    is_read = threading.Event()

    def step(self: Loader, consumed_samples: int, size: StepSize) -> list[torch.Tensor]:
        asked[consumed_samples, size.batch] = threading.current_thread().name
        if (consumed_samples, size.batch) == (8, 6):
            is_read.set()
        return real(self, consumed_samples, size)

    monkeypatch.setattr(Loader, "step", step)
    with reading_ahead(loader, device=CPU) as read_step:
        for consumed, after in ((0, 4), (4, 6), (100, 4), (0, 4)):  # a resume may begin anywhere
            for batch, expected in zip(
                read_step(consumed, FOUR, StepSize(after, 8)), real(loader, consumed, FOUR), strict=True
            ):
                assert torch.equal(batch, expected)
            if consumed == 4:
                assert is_read.wait(60), "the step after it is read while nobody asks for it"
    assert all(name.startswith("reading ahead") for name in asked.values())
    assert [*asked] == [(0, 4), (4, 4), (8, 6), (100, 4), (104, 4)], "nothing is read twice that was read ahead"


def test_an_error_while_reading_ahead_is_raised_when_asked_for(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, real = rank.loader(rank.config(tmp_path / "run")), Loader.step

    def step(self: Loader, consumed_samples: int, size: StepSize) -> list[torch.Tensor]:
        if consumed_samples == 4:
            raise OSError(5, "Input/output error", "data.bin")
        return real(self, consumed_samples, size)

    monkeypatch.setattr(Loader, "step", step)
    with reading_ahead(loader, device=CPU) as read_step:
        read_step(0, FOUR, FOUR)
        with pytest.raises(OSError, match=r"data\.bin"):
            read_step(4, FOUR, FOUR)
        assert len(read_step(8, FOUR, FOUR)) == 2, "and the others can be read"
    for thread in threading.enumerate():
        if thread.name.startswith("reading ahead"):
            thread.join(60)
            assert not thread.is_alive()


def test_a_read_that_hangs_delays_no_end(rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, real, disk = rank.loader(rank.config(tmp_path / "run")), Loader.step, threading.Event()

    def step(self: Loader, consumed_samples: int, size: StepSize) -> list[torch.Tensor]:
        assert consumed_samples == 0 or disk.wait(60)
        return real(self, consumed_samples, size)

    monkeypatch.setattr(Loader, "step", step)
    try:
        with reading_ahead(loader, device=CPU) as read_step:
            read_step(0, FOUR, FOUR)
        (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("reading ahead"))
        assert thread.daemon, "Python waits for every other thread before it ends"
    finally:
        disk.set()
    thread.join(60)
    assert not thread.is_alive()
