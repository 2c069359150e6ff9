"""The size of each step: its batch, and the length that its sequences are cut to. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import RunConfig, Train


@dataclass(frozen=True)
class StepSize:
    """The size of a step.

    Attributes:
        batch: Sequences over all data ranks, of `data.sequence_length` tokens each.
        length: Tokens of the pieces that they are cut into; `data.sequence_length` if they are not.
    """

    batch: int
    length: int


def size_of(step: int, config: "RunConfig") -> StepSize:
    """Return the size of a step, counted from 1."""
    shorter, _ = _length_of(step, config.train)
    return StepSize(batch_of(step, config.train), shorter or config.data.sequence_length)


def steps_of_its_length(step: int, train: "Train") -> int:
    """Return how many steps up to one, counted from 1, have its length: 2 for the second of them."""
    _, before = _length_of(step, train)
    return step - before


def steps_of_one_length(step: int, train: "Train", other: "Train") -> int:
    """Return how many steps up to one have the same length in two runs of one `data.sequence_length`."""
    (length, before), (other_length, other_before) = (_length_of(step, each) for each in (train, other))
    return step - max(before, other_before) if length == other_length else 0


def samples_by_length(first: int, last: int, config: "RunConfig") -> Iterator[tuple[int, int]]:
    """Yield each length of the steps after one and up to another, with the sequences of these steps."""
    for shorter, before, end in _lengths(config.train):
        begins, ends = max(first, before), int(min(last, end))
        if begins < ends:
            samples = samples_until(ends, config.train) - samples_until(begins, config.train)
            yield shorter or config.data.sequence_length, samples


def _length_of(step: int, train: "Train") -> tuple[int | None, int]:
    """Return the length of a step, None for the full one, and how many steps there are before its first."""
    return next((length, before) for length, before, end in _lengths(train) if step <= end)


def _lengths(train: "Train") -> Iterator[tuple[int | None, int, float]]:
    """Yield each length, None for the full one, how many steps there are before its first, and its last step."""
    before = 0
    for length, steps in train.length_warmup:
        yield length, before, before + steps
        before += steps
    yield None, before, math.inf


def batch_of(step: int, train: "Train") -> int:
    """Return the sequences of a step, counted from 1."""
    return samples_until(step, train) - samples_until(step - 1, train)


def samples_until(step: int, train: "Train") -> int:
    """Return the sequences of all steps up to one, counted from 1."""
    samples, left = 0, step
    for batch, steps in train.batch_warmup:
        taken = min(left, steps)
        samples, left = samples + taken * batch, left - taken
    return samples + left * train.global_batch


def batches_of(train: "Train") -> tuple[int, ...]:
    """Return the batches of a run, in their order."""
    return (*(batch for batch, _ in train.batch_warmup), train.global_batch)


def lengths_of(config: "RunConfig") -> tuple[int, ...]:
    """Return the lengths of a run's sequences, in their order."""
    return (*(length for length, _ in config.train.length_warmup), config.data.sequence_length)
