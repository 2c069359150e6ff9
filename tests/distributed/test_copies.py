"""Copies of a tied or replicated parameter stay equal, also where their gradients are added in another order."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.timer import SynchronizedWallClockTimer, ThroughputTimer
from torch import Tensor

from configs.schema import RunConfig
from parallel.axes import Group, Groups
from parallel.collectives import broadcast_from_first
from parallel.copies import equalize_copies
from parallel.engine import Engine
from parallel.start import ProcessRank
from tests.support.layouts import VOCABULARY, begin, build, config_of, tokens_of
from tests.support.ranks import run_ranks, start_again
from training.checkpoint.read import open_checkpoint
from training.saver import Saver
from training.state import TrainState

RANKS, STEPS = 6, 4  # three data ranks: with two, a sum has one order


@dataclass(frozen=True)
class Case:
    """Two ranks on one axis hold a copy of a parameter."""

    axis: str
    precision: str
    parameter: str


CASES = {
    "stages": Case("pipeline", "fp32", "embedding.word.weight"),
    "stages in bf16": Case("pipeline", "bf16", "embedding.word.weight"),
    "tensor ranks": Case("tensor", "fp32", "final_norm.weight"),
}


@dataclass(frozen=True)
class Copies:
    """One rank's copy of the parameter, by kind of state, and what differed.

    Attributes:
        trained: After training with sums in another order on the second rank of the axis.
        drifted: What `equalize_copies` reported then.
        repaired: After the copy on that rank was changed by hand, and a checkpoint saved.
        changed: Warnings of this save.
        timings: What DeepSpeed's timers kept of the steps.
    """

    trained: dict[str, Tensor]
    drifted: list[str]
    repaired: dict[str, Tensor]
    changed: list[str]
    timings: list[Any]


@contextmanager
def sums_in_another_order(*, data: Group, backwards: bool) -> Iterator[None]:
    """Add over the data ranks one after another, on some ranks from the last to the first, as NCCL may."""
    reduce = dist.all_reduce

    def in_order(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if group is None or dist.get_process_group_ranks(group) != dist.get_process_group_ranks(data.handle):
            return reduce(tensor, op=op, group=group, async_op=async_op)
        parts = [torch.empty_like(tensor) for _ in range(data.size)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        total, *others = reversed(parts) if backwards else parts
        for part in others:
            total = total + part
        tensor.copy_(total)
        return None

    with patch.object(dist, "all_reduce", in_order):
        yield


def train_copies(process: ProcessRank, *, folder: Path) -> dict[str, Copies]:
    """Train each case on three data ranks."""
    measured = {}
    for number, (name, case) in enumerate(CASES.items()):
        start_again(process, number=number)
        layout = {"tensor": 1, "pipeline": 1, "zero": 1, case.axis: 2}
        more = ("train.micro_batch=1", "train.global_batch=6", f"train.precision={case.precision}")
        config = config_of(layout, run_dir=folder / str(number), more=more)
        engine, groups, _ = build(config, world_size=process.world_size)
        state, second = engine.state(), getattr(groups, case.axis).rank == 1
        with sums_in_another_order(data=groups.data, backwards=second):
            for step in range(STEPS):
                mine = tokens_of(step, samples=6).chunk(groups.data.size)[groups.data.rank]
                engine.train_step(list(mine.chunk(2)), learning_rate=3e-3)
        trained = {kind: state.read(case.parameter, kind).clone() for kind in state.kinds_of(case.parameter)}
        drifted = equalize_copies(state, groups=groups)
        if second:
            state.write(case.parameter, "exp_avg", trained["exp_avg"] + 1e-3)
        changed = warnings_of_a_save(engine, config, groups=groups, tokenizer=folder / "tokenizer.model")
        repaired = {kind: state.read(case.parameter, kind).clone() for kind in state.kinds_of(case.parameter)}
        measured[name] = Copies(trained, drifted, repaired, changed, timings_kept())
    return measured


class FirstSamples:
    """The part of a loader that a save reads."""

    def first_samples(self, count: int) -> list[Tensor]:
        """Return `count` samples, [1, seq + 1] each."""
        return list(tokens_of(97, samples=count).split(1))

    def order_hash(self, consumed_samples: int) -> str:
        """Return a hash of no samples."""
        return ""


def warnings_of_a_save(engine: Engine, config: RunConfig, *, groups: Groups, tokenizer: Path) -> list[str]:
    """Save a checkpoint as a run does, and return this rank's warnings."""
    fence = broadcast_from_first(lambda: begin(config), group=groups.world)
    data: Any = SimpleNamespace(tokenizer=tokenizer, vocab_size=VOCABULARY)
    loader: Any = FirstSamples()
    saver = Saver(engine, loader, config=config, prepared=data, groups=groups, fence=fence, start=TrainState(0, 0))
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("training.saver").addHandler(handler)
    saver.begin(TrainState(STEPS, STEPS * 6), validation_loss=None)
    saver.finish()
    logging.getLogger("training.saver").removeHandler(handler)
    return records


def timings_kept() -> list[Any]:
    """Return what DeepSpeed's timers in this process keep: on a GPU, events that are never freed."""
    timers = [timer for timer in gc.get_objects() if isinstance(timer, SynchronizedWallClockTimer.Timer)]
    waiting = [timer for timer in gc.get_objects() if isinstance(timer, ThroughputTimer) and timer.initialized]
    return [*waiting, *(timing for timer in timers for timing in timer.event_timers)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def copies(runs: Path) -> list[dict[str, Copies]]:
    """Copies by rank and case."""
    (runs / "tokenizer.model").write_bytes(b"no test here reads it")
    return run_ranks(train_copies, ranks=RANKS, arguments={"folder": runs})


@pytest.mark.parametrize("name", ["stages", "stages in bf16"])
def test_tied_copies_stay_equal_in_any_order_of_sums(copies: list[dict[str, Copies]], name: str) -> None:
    for rank in copies:
        assert rank[name].drifted == []
        for kind, value in copies[0][name].trained.items():
            assert torch.equal(rank[name].trained[kind], value), kind


@pytest.mark.parametrize("name", CASES)
def test_a_save_names_a_difference_and_ends_it(copies: list[dict[str, Copies]], runs: Path, name: str) -> None:
    case, first = CASES[name], copies[0][name]
    named = f"{case.parameter} exp_avg on {case.axis} rank 1 and on 0"
    assert first.changed == [f"step {STEPS}: the copies of {named} differed: the first one was copied"]
    saved = open_checkpoint(runs / str(list(CASES).index(name)))
    for kind, value in first.trained.items():
        assert all(torch.equal(rank[name].repaired[kind], value) for rank in copies), kind
        assert torch.equal(saved.tensor(case.parameter, kind=kind), value), kind
    if name == "tensor ranks":
        assert first.drifted, "sums in another order changed nothing, so this test would miss a drift"


@pytest.mark.parametrize("name", CASES)
def test_no_timer_of_deepspeed_runs(copies: list[dict[str, Copies]], name: str) -> None:
    assert all(rank[name].timings == [] for rank in copies)
