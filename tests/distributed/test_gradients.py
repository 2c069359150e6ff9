"""Gradients of micro-batches are added up in fp32, and a step reads nothing of its device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.engine import Engine
from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, tokens_of
from tests.support.ranks import run_ranks, start_again

MICRO_BATCHES = 2
# A layout, its precision, and how many values DeepSpeed reads in a step: where it partitions gradients it takes their
# norm in its own way.
CASES: list[tuple[dict[str, int], str, int]] = [
    ({"tensor": 2, "pipeline": 1, "zero": 2}, "fp32", 0),
    ({"tensor": 1, "pipeline": 2, "zero": 1}, "fp32", 0),
    ({"tensor": 1, "pipeline": 1, "zero": 0}, "fp32", 0),
    ({"tensor": 2, "pipeline": 1, "zero": 2}, "bf16", 0),
    ({"tensor": 1, "pipeline": 2, "zero": 1}, "bf16", 0),
    ({"tensor": 1, "pipeline": 1, "zero": 1}, "bf16", 0),
    ({"tensor": 1, "pipeline": 1, "zero": 1, "overlap": True}, "bf16", 0),
    ({"tensor": 1, "pipeline": 1, "zero": 2}, "bf16", 4),
    ({"tensor": 1, "pipeline": 1, "zero": 3}, "bf16", 1),
]


class Reads(TorchDispatchMode):
    """Counts the values that Python reads: on a GPU each would wait for all work so far."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def gradients_of(engine: Engine, micro_batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of one step that moves no weight, up to a factor, in fp64."""
    state = engine.state()
    for name in state.parameters:
        state.write(name, "exp_avg", torch.zeros_like(state.read(name, "exp_avg")))
    engine.train_step(micro_batches, learning_rate=0.0)
    return {name: state.read(name, "exp_avg").double() for name in state.parameters}


def measure(process: ProcessRank, *, folder: Path) -> list[tuple[dict[str, float], int]]:
    """Return for each layout how far each gradient is from the fp64 mean of its micro-batches', and a step's reads."""
    measured = []
    for number, (layout, precision, _) in enumerate(CASES):
        start_again(process, number=number)
        data = process.world_size // (layout["tensor"] * layout["pipeline"])
        sizes = ("train.micro_batch=2", f"train.global_batch={2 * data * MICRO_BATCHES}", "train.clip=1e9")
        config = config_of(layout, run_dir=folder, more=(*sizes, f"train.precision={precision}"))
        engine, groups, _ = build(config, world_size=process.world_size)
        batches = [tokens_of(part + 10 * groups.data.rank, samples=2) for part in range(MICRO_BATCHES)]
        # Each part alone, as often as a step needs: a half of it, twice, is exact.
        parts = [gradients_of(engine, [batch] * MICRO_BATCHES) for batch in batches]
        whole = gradients_of(engine, batches)
        # A step may have another number of micro-batches than the one before.
        more, one = gradients_of(engine, [batches[0], *batches, batches[0]]), gradients_of(engine, batches[1:])
        with Reads() as reads:
            engine.train_step(batches, learning_rate=1e-3)
        errors = {}
        for found, counts in ((whole, (1, 1)), (more, (3, 1)), (one, (0, 1))):
            for name, gradient in found.items():
                mean = sum(part[name] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
                errors[f"{name} of {sum(counts)}"] = float((gradient - mean).norm() / mean.norm())
        measured.append((errors, reads.count))
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[dict[str, float], int]]]:
    return run_ranks(measure, ranks=2, arguments={"folder": tmp_path_factory.mktemp("runs")})


@pytest.mark.parametrize("index", range(len(CASES)))
def test_micro_batches_add_up_in_fp32(measured: list[list[tuple[dict[str, float], int]]], index: int) -> None:
    for rank in measured:
        errors, _ = rank[index]
        assert len(errors) > 2
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_step_waits_for_no_value(measured: list[list[tuple[dict[str, float], int]]], index: int) -> None:
    for rank in measured:
        assert rank[index][1] == CASES[index][2]
