"""`checkpoint.background`: training goes on while a checkpoint is written, and the checkpoint is that of its step."""

import errno
import json
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from configs.errors import InputError
from parallel.engine import StepOutcome
from tests.support.disk import counted_operations, fail_operation
from tests.support.one_rank import OneRank
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.rank_part import BackgroundWriter, SaveError, as_save_error
from training.metrics_file import MetricsFile
from training.observers import Observer, Save, StepResult
from training.state import TrainState
from training.trainer import Trainer

STEPS, EVERY = 9, 4
PATIENCE = 60


class Told(Observer):
    """Keeps what an observer is told of steps and saves, and calls a function at each step."""

    def __init__(self, then: Callable[[int], None] = lambda step: None) -> None:
        self.events: list[tuple[str, int]] = []
        self.waits: list[tuple[float, bool]] = []
        self._then = then

    def on_step(self, result: StepResult) -> None:
        self.events.append(("step", result.step))
        self._then(result.step)

    def on_save(self, save: Save) -> None:
        self.events.append(("saved", save.step))

    def on_save_wait(self, seconds: float, *, goes_on: bool) -> None:
        self.waits.append((seconds, goes_on))


def trainer_of(rank: OneRank, run_dir: Path, *more: str, background: bool = True, steps: int = STEPS) -> Trainer:
    rules = ["checkpoint.keep=9", f"checkpoint.every={EVERY}", f"checkpoint.background={str(background).lower()}"]
    return rank.trainer(rank.config(run_dir, f"train.steps={steps}", f"train.decay_steps={STEPS}", *rules, *more))


def train(trainer: Trainer, *observers: Observer) -> TrainState:
    return trainer.run([MetricsFile(trainer.fence.run_dir, last_step=trainer.start.step), *observers])


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(run_dir: Path) -> list[list[Any]]:
    return [[line[key] for key in ("step", "loss", "grad_norm", "learning_rate")] for line in lines_of(run_dir)]


def tensors_of(run_dir: Path) -> dict[int, dict[str, str]]:
    """Return the hashes of each whole checkpoint's tensor files, by step."""
    manifests = [check_whole(checkpoint.path) for checkpoint in list_checkpoints(run_dir)]
    return {
        manifest.step: {name: file.sha256 for name, file in manifest.files.items() if name.endswith("safetensors")}
        for manifest in manifests
    }


@contextmanager
def background_disk(operate: Callable[[str], None]) -> Iterator[None]:
    """Call a function before each file operation of the thread that writes in the background."""
    training = threading.get_ident()

    def before(number: int, name: str) -> None:
        if threading.get_ident() != training:
            operate(name)

    with counted_operations(before):
        yield


@pytest.fixture(scope="module")
def foreground(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("foreground") / "run"
    train(trainer_of(rank, run_dir, background=False))
    return run_dir


def test_steps_are_taken_while_a_checkpoint_is_written(rank: OneRank, foreground: Path, tmp_path: Path) -> None:
    gate, run_dir = threading.Event(), tmp_path / "run"
    trainer = trainer_of(rank, run_dir)

    def then(step: int) -> None:
        if step == EVERY + 1:
            assert list_checkpoints(run_dir) == [], "it has no name before it is whole"
            gate.set()
            wait_until_written(trainer)

    told = Told(then)
    with background_disk(lambda name: assert_waited(gate)):
        train(trainer, told)
    place = told.events.index(("saved", EVERY))
    assert told.events[place - 2 : place + 2] == [("step", 5), ("step", 6), ("saved", EVERY), ("step", 7)]
    assert [step for kind, step in told.events if kind == "saved"] == [EVERY, 2 * EVERY, STEPS]
    assert figures(run_dir) == figures(foreground)
    assert tensors_of(run_dir) == tensors_of(foreground), "a checkpoint holds a later step's weights"
    # in the foreground training waits once for a save, in the background at its begin and at its end
    goes_on = [goes_on for _, goes_on in told.waits]
    assert goes_on == [True, False, True, False, False]
    reported = [line["save_seconds"] for line in lines_of(run_dir) if "save_seconds" in line]
    assert reported[0] == pytest.approx(told.waits[0][0] + told.waits[1][0])
    assert not any("failed_saves" in line for line in lines_of(run_dir))
    assert rank.trainer(rank.config(run_dir, f"train.decay_steps={STEPS}")).start.step == STEPS


def test_steps_launched_ahead_change_no_checkpoint(rank: OneRank, foreground: Path, tmp_path: Path) -> None:
    run_dir, told = tmp_path / "run", Told()
    train(replace(trainer_of(rank, run_dir), steps_ahead=1), told)
    assert [step for kind, step in told.events if kind == "saved"] == [EVERY, 2 * EVERY, STEPS]
    assert figures(run_dir) == figures(foreground)
    assert tensors_of(run_dir) == tensors_of(foreground)


def assert_waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def wait_until_written(trainer: Trainer) -> None:
    deadline = time.monotonic() + PATIENCE
    while trainer.saver.is_writing:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_copies_keep_their_values_and_their_memory() -> None:
    background, value = BackgroundWriter(), torch.arange(6.0).view(2, 3).T
    first = background.copy("weight", "name", value)
    value += 1
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]]
    place = first.data_ptr()
    assert background.copy("weight", "name", value).data_ptr() == place
    assert first.tolist() == value.tolist()
    assert background.copy("exp_avg", "name", value).data_ptr() != place


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "close"])
def test_a_disk_that_fails_in_the_background_costs_one_save(
    rank: OneRank, foreground: Path, tmp_path: Path, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[str] = []

    def fail_once(name: str) -> None:
        if name == operation and not failed:
            failed.append(name)
            fail_operation()

    run_dir = tmp_path / "run"
    with background_disk(fail_once):
        train(trainer_of(rank, run_dir))
    assert failed
    assert caplog.text.count(f"NOT SAVED: {run_dir}/checkpoints/step_0000004 was not saved (Input/output error") == 1
    assert figures(run_dir) == figures(foreground)
    assert [*tensors_of(run_dir)] == [2 * EVERY, STEPS]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_0000008", "step_0000009"]
    assert [line.get("failed_saves") for line in lines_of(run_dir)][-1] == 1


def test_a_disk_slower_than_the_steps_makes_training_wait(
    rank: OneRank, foreground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, told = tmp_path / "run", Told()
    waits: list[str] = []
    gates = {step: threading.Event() for step in (1, 2)}

    def operate(name: str) -> None:
        if name == "fsync":
            saved = sum(kind == "saved" for kind, _ in told.events)
            assert_waited(gates[saved + 1])

    def waiting(message: str, step: int) -> None:
        waits.append(message % step)
        gates[step].set()

    monkeypatch.setattr(logging.getLogger("training.saves"), "info", waiting)
    with background_disk(operate):
        train(trainer_of(rank, run_dir, "checkpoint.every=1", steps=3), told)
    saved = [step for kind, step in told.events if kind == "saved"]
    assert saved == [1, 2, 3]
    assert waits == [f"waiting for the checkpoint of step {step}, which is still being written" for step in (1, 2)]
    assert tensors_of(run_dir)[3] != tensors_of(run_dir)[2] != tensors_of(run_dir)[1]
    assert figures(run_dir) == figures(foreground)[:3]


def test_a_stop_keeps_the_checkpoint_that_is_being_written(rank: OneRank, tmp_path: Path) -> None:
    run_dir, gate = tmp_path / "run", threading.Event()
    trainer = trainer_of(rank, run_dir)

    def then(step: int) -> None:
        if step == EVERY + 1:
            trainer.stop.ask()
            gate.set()

    with background_disk(lambda name: assert_waited(gate)):
        end = train(trainer, Told(then))
    assert end.step == EVERY + 1
    assert [*tensors_of(run_dir)] == [EVERY, EVERY + 1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_diverges_keeps_the_step_that_was_good(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    real, gate, run_dir = type(rank.engine).train_step, threading.Event(), tmp_path / "run"
    steps = iter(range(1, STEPS + 1))

    def train_step(*arguments: Any, **more: Any) -> StepOutcome:
        outcome: StepOutcome = real(*arguments, **more)
        if next(steps) <= EVERY:
            return outcome
        gate.set()
        return StepOutcome(torch.tensor(math.nan), outcome.grad_norm)

    def operate(name: str) -> None:
        assert_waited(gate)
        fail_operation(fails)

    monkeypatch.setattr(type(rank.engine), "train_step", train_step)
    kept = "; no checkpoint was saved$" if fails else "goes back to .*/step_0000004, without"
    with background_disk(operate), pytest.raises(InputError, match=kept):
        train(trainer_of(rank, run_dir))
    assert [*tensors_of(run_dir)] == ([] if fails else [EVERY])
    assert ("NOT SAVED" in caplog.text) is fails
    assert "training continues" not in caplog.text


def test_a_run_folder_that_is_gone_is_to_be_put_back() -> None:
    with pytest.raises(SaveError, match=r"^run/step_1 was not saved \(No such file .* run/x\): put the folder back"):
        with as_save_error(Path("run/step_1")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "run/x")


def test_a_save_gathers_one_tensor_at_a_time(rank: OneRank, tmp_path: Path) -> None:
    trainer = trainer_of(rank, tmp_path / "run", steps=EVERY + 1)
    state, gathered = trainer.engine.state(), list[weakref.ref[torch.Tensor]]()
    read = state.read

    def read_alone(name: str, kind: str) -> torch.Tensor:
        assert not any(value() is not None for value in gathered), "the tensor before takes memory of a GPU too"
        value = read(name, kind)
        gathered.append(weakref.ref(value))
        return value

    with patch.object(type(state), "read", staticmethod(read_alone)):
        trainer.saver.begin(TrainState(EVERY, EVERY), validation_loss=None, background=True)
        trainer.saver.finish()
    assert len(gathered) == sum(len(state.kinds_of(name)) for name in state.parameters)
