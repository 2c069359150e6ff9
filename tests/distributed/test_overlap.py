"""`parallel.overlap`: gradients that are averaged while others are computed are those averaged afterwards."""

import inspect
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again

# Two data ranks, whose sums have one order, and four; stages of one block, and several blocks.
LAYOUTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"tensor": 1, "pipeline": 2, "zero": 1}, ("model.layers=2",)),
    ({"tensor": 2, "pipeline": 1, "zero": 1, "sequence": True}, ("train.recompute=true",)),
    ({"tensor": 1, "pipeline": 1, "zero": 1}, ("model.position=t5", "train.optimizer=muon")),
]

FOUR = 2


class Measured(NamedTuple):
    """Of one rank: each step's loss and gradient norm, weights at the end, reductions during and after backward."""

    steps: list[tuple[float, float]]
    weights: dict[str, Tensor]
    early: int
    late: int


def measure(process: ProcessRank, *, folder: Path) -> list[tuple[Measured, Measured]]:
    return [
        (
            train(process, layout, more, overlap=False, number=2 * number, folder=folder),
            train(process, layout, more, overlap=True, number=2 * number + 1, folder=folder),
        )
        for number, (layout, more) in enumerate(LAYOUTS)
    ]


def train(
    process: ProcessRank, keys: dict[str, Any], more: tuple[str, ...], *, overlap: bool, number: int, folder: Path
) -> Measured:
    start_again(process, number=number)
    config = config_of({**keys, "overlap": overlap}, run_dir=folder, more=("train.precision=bf16", *more))
    engine, groups, layout = build(config, world_size=process.world_size)
    early, reduce = [], dist.reduce

    def noted(*arguments: Any, **options: Any) -> Any:
        early.append(all(frame.function != "finish" for frame in inspect.stack()))
        return reduce(*arguments, **options)

    steps = []
    with patch.object(dist, "reduce", noted):
        for step in range(3):
            figures = take_step(engine, tokens_of(step), groups=groups, layout=layout, learning_rate=3e-3)
            engine.mean_loss([tokens_of(9, samples=2)])  # a forward pass that none goes back through
            steps.append((figures.loss, figures.grad_norm))
    state = engine.state()
    weights = {name: state.read(name, "weight").clone() for name in state.parameters}
    return Measured(steps, weights, sum(early), len(early) - sum(early))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Measured, Measured]]]:
    return run_ranks(measure, ranks=4, arguments={"folder": tmp_path_factory.mktemp("runs")})


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_overlap_changes_no_gradient(measured: list[list[tuple[Measured, Measured]]], index: int) -> None:
    for rank in measured:
        after, meanwhile = rank[index]
        if index == FOUR:  # their sums may be added up in another order, and weights in bf16 round otherwise
            assert meanwhile.steps[0] == pytest.approx(after.steps[0], rel=1e-6)
            continue
        assert meanwhile.steps == after.steps
        for name, weight in after.weights.items():
            assert torch.equal(meanwhile.weights[name], weight), name


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_parts_are_sent_during_the_backward_pass(measured: list[list[tuple[Measured, Measured]]], index: int) -> None:
    for rank in measured:
        after, meanwhile = rank[index]
        assert (after.early, after.late) == (0, 0)
        assert meanwhile.early > 0
        assert meanwhile.late > 0  # with the word embedding, or norms and biases
