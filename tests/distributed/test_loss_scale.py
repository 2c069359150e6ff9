"""fp16: a step whose gradients overflow is taken again with a smaller loss scale, in every layout, and none is lost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.engine import Engine
from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, name_of, tokens_of
from tests.support.ranks import run_ranks, start_again

RANKS, SAMPLES = 4, 8
HUGE = 2.0**23
KEYS = ("train.precision=fp16", "model.dropout=0.2", "train.micro_batch=1", f"train.global_batch={SAMPLES}")
LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True},
    {"tensor": 1, "pipeline": 2, "zero": 1, "offload": "cpu"},
    {"tensor": 1, "pipeline": 1, "zero": 3},
]
NAMES = [name_of(keys, ranks=RANKS) for keys in LAYOUTS]


@dataclass(frozen=True)
class Seen:
    """A rank's steps: loss scale, loss and gradient norm of each, and its state after them by name and kind."""

    steps: list[tuple[float | None, float, float]]
    state: dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Measured:
    """One rank in one layout.

    Attributes:
        overflowed: Two steps, the first with a loss scale that overflows.
        fitting: The same from the scale that then fits.
        poisoned: A step with a weight that is not finite.
        before: The state before that.
    """

    overflowed: Seen
    fitting: Seen
    poisoned: Seen
    before: dict[tuple[str, str], Tensor]


def state_of(engine: Engine) -> dict[tuple[str, str], Tensor]:
    state = engine.state()
    return {(name, kind): state.read(name, kind).clone() for name in state.parameters for kind in state.kinds_of(name)}


def measure(process: ProcessRank, *, folder: Path) -> list[Measured]:
    measured, number = [], 0
    for keys in LAYOUTS:
        scale, seen = HUGE, []
        for _ in range(2):
            start_again(process, number=number)
            number += 1
            engine, groups, layout = build(config_of(keys, run_dir=folder, more=KEYS), world_size=process.world_size)
            place = groups.data, layout.micro_batches

            def take(step: int, scale: float, engine: Engine = engine, place: Any = place) -> tuple[Any, ...]:
                data, micro_batches = place
                torch.manual_seed(step)
                mine = tokens_of(step, samples=SAMPLES).chunk(data.size)[data.rank]
                outcome = engine.train_step(list(mine.chunk(micro_batches)), learning_rate=1e-2, loss_scale=scale)
                return outcome.loss_scale, float(outcome.loss), float(outcome.grad_norm)

            steps = [take(1, scale)]
            scale = steps[0][0]
            steps.append(take(2, scale))
            seen.append(Seen(steps, state_of(engine)))
        name = next(iter(engine.state().parameters))
        engine.state().write(name, "weight", torch.full_like(engine.state().read(name, "weight"), torch.inf))
        before = state_of(engine)
        measured.append(Measured(seen[0], seen[1], Seen([take(3, 4.0)], state_of(engine)), before))
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[Measured]]:
    """By layout, the ranks."""
    by_rank = run_ranks(measure, ranks=RANKS, arguments={"folder": tmp_path_factory.mktemp("run")})
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=NAMES)
def test_a_step_is_taken_again_until_its_gradients_fit(measured: list[list[Measured]], layout: int) -> None:
    ranks = measured[layout]
    assert len({rank.overflowed.steps[0][0] for rank in ranks}) == 1, "all ranks agree"
    for rank in ranks:
        (scale, *_), (second, *_) = rank.overflowed.steps
        assert scale is not None
        assert 1 < scale < HUGE
        assert scale == second, "it stays"
        assert all(torch.isfinite(torch.tensor(step[1:])).all() for step in rank.overflowed.steps)
        # As if nothing had overflowed: the same dropout, no moment touched, no step counted twice.
        assert rank.overflowed.steps == rank.fitting.steps
        for key, value in rank.fitting.state.items():
            assert torch.equal(rank.overflowed.state[key], value), key


@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=NAMES)
def test_what_no_scale_helps_is_told_and_changes_nothing(measured: list[list[Measured]], layout: int) -> None:
    for rank in measured[layout]:
        ((scale, _, norm),) = rank.poisoned.steps
        assert scale == 4, "it is not taken again"
        assert not torch.isfinite(torch.tensor(norm))
        for key, value in rank.before.items():
            torch.testing.assert_close(rank.poisoned.state[key], value, rtol=0, atol=0, msg=str(key))
