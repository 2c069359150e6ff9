"""Kernels between the matrix products, in Triton's interpreter: two ranks train as they do without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from parallel.fused_kernels import FUSED_KERNELS
from parallel.head import as_it_is
from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again
from training import build as building

# What is not named is data parallel.
CASES: tuple[tuple[dict[str, object], tuple[str, ...]], ...] = (
    ({"tensor": 2, "zero": 1}, ("model.family=mpt",)),
    ({"tensor": 2, "zero": 1, "sequence": True}, ("model.family=jais", "train.recompute=selective")),
    ({"tensor": 1, "zero": 3}, ("train.recompute=true",)),
)
# The interpreter takes milliseconds for each row.
SMALL = ("model.layers=2", "data.sequence_length=8", "train.micro_batch=1", "train.global_batch=2", "train.clip=1e9")


def train(process: ProcessRank, *, folder: Path) -> list[list[tuple[float, float]]]:
    """Return for each case the losses and norms of two steps without the kernels and with them."""
    taken = []
    for number, (layout, more) in enumerate(CASES):
        for compiled in (as_it_is, _by_kernels):
            start_again(process, number=2 * number + (compiled is _by_kernels))
            config = config_of({"pipeline": 1, **layout}, run_dir=folder, more=(*SMALL, *more))
            with mock.patch.object(building, "make_compile", lambda *_, compiled=compiled, **__: compiled):
                engine, groups, shape = build(config, world_size=2)
            steps = (tokens_of(step, samples=2, length=8) for step in range(2))
            figures = [take_step(engine, step, groups=groups, layout=shape, learning_rate=3e-3) for step in steps]
            taken.append([(each.loss, each.grad_norm) for each in figures])
    return taken


def _by_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    return FUSED_KERNELS.get(function, function)


def test_two_ranks_train_as_without_the_kernels(tmp_path: Path) -> None:
    for taken in run_ranks(train, ranks=2, arguments={"folder": tmp_path}):
        for plain, fused in zip(taken[::2], taken[1::2], strict=True):
            assert [loss for loss, _ in fused] == pytest.approx([loss for loss, _ in plain], rel=1e-6)
            assert [norm for _, norm in fused] == pytest.approx([norm for _, norm in plain], rel=1e-5)
            assert plain[0] != plain[1]
