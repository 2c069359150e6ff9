"""A validation is the mean loss of fixed samples, in every layout and micro-batch."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.load import load_run
from parallel.axes import Group
from training.validator import Validation, Validator

LENGTH = 8


class HeldOut:
    """Samples that repeat a token, whose loss is its id."""

    sizes, weights, sequence_length = (9, 4), (1.0, 3.0), LENGTH

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [ids, LENGTH + 1]."""
        return np.repeat(np.asarray(ids)[:, None], LENGTH + 1, axis=1)


class Means:
    """An engine of one rank: mean losses of its own micro-batches. It keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def mean_loss(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """Return the mean of the micro-batches' means, as an engine does."""
        self.seen += micro_batches
        return float(torch.stack([batch.double().mean() for batch in micro_batches]).mean())


def validate(samples: int, *more: str, micro_batch: int, ranks: int) -> tuple[Validation, set[int]]:
    """Return the mean losses over all ranks, and the samples that they had."""
    keys = ("evaluate.every=5", f"evaluate.samples={samples}", f"train.micro_batch={micro_batch}")
    sources = "data.sources=[{path: a, weight: 1}, {path: b, weight: 3}]"
    more = (*more, sources, f"data.sequence_length={LENGTH}", f"train.global_batch={48 * micro_batch}")
    config = load_run("demo", overrides=[*keys, *more, "data.split=0.1"])
    measured, seen = [], set()
    for rank in range(ranks):
        engine = Means()
        validator = Validator(engine, HeldOut(), config=config, data=Group(rank, ranks, None))  # type: ignore[arg-type]
        assert [validator.is_due(step) for step in (4, 10)] == [False, True]
        measured.append(validator.measure())
        assert all(batch.numel() <= max(LENGTH, micro_batch * LENGTH) + len(batch) for batch in engine.seen)
        seen |= {int(token) for batch in engine.seen for token in batch.flatten()}
    return mean_of(measured), seen


def mean_of(measured: Sequence[Validation]) -> Validation:
    """Return what an engine of all ranks would measure."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(measured)

    return Validation(
        mean(each.loss for each in measured),
        {length: mean(each.by_length[length] for each in measured) for length in measured[0].by_length},
        {source: mean(each.by_source[source] for each in measured) for source in measured[0].by_source},
    )


@pytest.mark.parametrize("samples", [1, 5, 7, 12, 13, 64])
def test_a_validation_is_the_mean_of_the_same_samples(samples: int) -> None:
    expected, chosen = validate(samples, micro_batch=1, ranks=1)
    assert len(chosen) == min(samples, 13)
    assert expected == Validation(pytest.approx(sum(chosen) / len(chosen), rel=1e-12), {}, {})
    of_sources = {"a": [token for token in chosen if token < 9], "b": [token for token in chosen if token >= 9]}
    for micro_batch in (1, 2, 3, 16):
        for ranks in (1, 2, 3, 4, 16):
            measured, seen = validate(
                samples,
                "evaluate.validation_lengths=[2, 8]",
                "evaluate.by_source=true",
                micro_batch=micro_batch,
                ranks=ranks,
            )
            assert seen == chosen
            assert measured.loss == pytest.approx(expected.loss, rel=1e-12)
            assert measured.by_length == {2: pytest.approx(expected.loss, rel=1e-12)}
            means = {source: sum(tokens) / len(tokens) for source, tokens in of_sources.items() if tokens}
            assert measured.by_source == pytest.approx(means, rel=1e-12)
