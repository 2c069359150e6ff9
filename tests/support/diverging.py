"""Runs of one rank that diverge, and what they are compared with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loader import Loader
from parallel.engine import StepOutcome
from tests.support.one_rank import OneRank
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.metrics_file import MetricsFile
from training.observers import Observer, StepResult
from training.state import TrainState

STEPS, EVERY, BATCH = 9, 3, 4
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "consumed_samples")


class Killed(BaseException):
    """Ends a run as if its process were killed."""


class Told(Observer):
    """Keeps the steps that training went back to, and calls a function at each step."""

    def __init__(self, then: Callable[[StepResult], None] = lambda result: None) -> None:
        self.went_back: list[int] = []
        self._then = then

    def on_step(self, result: StepResult) -> None:
        self._then(result)

    def on_rollback(self, step: int) -> None:
        self.went_back.append(step)


def train(
    rank: OneRank, run_dir: Path, *more: str, told: Observer | None = None, steps: int = STEPS, ahead: int = 0
) -> TrainState:
    keys = [f"train.steps={steps}", f"train.decay_steps={steps}", f"checkpoint.every={EVERY}", "checkpoint.keep=9"]
    trainer = rank.trainer(rank.config(run_dir, *keys, "train.rollbacks=1", *more))
    return replace(trainer, steps_ahead=ahead).run(
        [
            MetricsFile(run_dir, last_step=trainer.start.step),
            *([told] if told else []),
        ]
    )


def lines_of(run_dir: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / file).read_text().splitlines()]


def results_of(run_dir: Path) -> tuple[list[list[Any]], dict[str, str]]:
    """Return each step's figures, and the hashes of the last checkpoint's tensors."""
    files = read_manifest(list_checkpoints(run_dir)[-1].path).files
    hashes = {name: file.sha256 for name, file in files.items() if name.endswith("safetensors")}
    return [[line[key] for key in EXACT] for line in lines_of(run_dir)], hashes


def poison_steps(rank: OneRank, monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make training diverge: the steps that are launched as the given numbers take a huge learning rate."""
    real, count = type(rank.engine).train_step, 0

    def train_step(*arguments: Any, learning_rate: float, **more: Any) -> StepOutcome:
        nonlocal count
        count += 1
        return real(*arguments, learning_rate=1e30 if count in calls else learning_rate, **more)

    monkeypatch.setattr(type(rank.engine), "train_step", train_step)


def train_without(
    rank: OneRank,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
    first: int,
    count: int,
    steps: int = STEPS,
) -> None:
    """Train a run whose stream lacks some samples, by another way than a rollback's."""
    real = Loader.step
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "step", lambda self, place, size: real(self, place + count * (place >= first), size))
        train(rank, run_dir, *more, steps=steps)


def losses_given(rank: OneRank, monkeypatch: pytest.MonkeyPatch, loss: Callable[[int], float]) -> None:
    """Give the steps that are launched losses of one's own, by their number."""
    real, count = type(rank.engine).train_step, 0

    def train_step(*arguments: Any, **more: Any) -> StepOutcome:
        nonlocal count
        count += 1
        return StepOutcome(torch.tensor(loss(count)), real(*arguments, **more).grad_norm)

    monkeypatch.setattr(type(rank.engine), "train_step", train_step)
