"""A validation is the mean loss of fixed samples, in every layout and micro-batch."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.load import load_run
from parallel.axes import Group
from training.validator import Validator


class HeldOut:
    """Samples of one token, whose loss is its id."""

    sizes, weights = (9, 4), (1.0, 3.0)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [ids, 1]."""
        return np.asarray(ids)[:, None]


class Means:
    """An engine of one rank: mean losses of its own micro-batches. It keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def mean_loss(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """Return the mean of the micro-batches' means, as an engine does."""
        self.seen += micro_batches
        return float(torch.stack([batch.double().mean() for batch in micro_batches]).mean())


def validate(samples: int, *, micro_batch: int, ranks: int) -> tuple[float, set[int]]:
    """Return the mean loss over all ranks, and the samples that they had."""
    keys = ("evaluate.every=5", f"evaluate.samples={samples}", f"train.micro_batch={micro_batch}")
    config = load_run("demo", overrides=[*keys, f"train.global_batch={48 * micro_batch}", "data.split=0.1"])
    losses, seen = [], set()
    for rank in range(ranks):
        engine = Means()
        validator = Validator(engine, HeldOut(), config=config, data=Group(rank, ranks, None))  # type: ignore[arg-type]
        assert [validator.is_due(step) for step in (4, 10)] == [False, True]
        losses.append(validator.loss())
        seen |= {int(token) for batch in engine.seen for token in batch.flatten()}
    return sum(losses) / ranks, seen


@pytest.mark.parametrize("samples", [1, 5, 7, 12, 13, 64])
def test_a_validation_is_the_mean_of_the_same_samples(samples: int) -> None:
    expected, chosen = validate(samples, micro_batch=1, ranks=1)
    assert len(chosen) == min(samples, 13)
    assert expected == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)
    for micro_batch in (1, 2, 3, 16):
        for ranks in (1, 2, 3, 4, 16):
            loss, seen = validate(samples, micro_batch=micro_batch, ranks=ranks)
            assert seen == chosen
            assert loss == pytest.approx(expected, rel=1e-12)
