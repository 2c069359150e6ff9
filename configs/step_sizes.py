"""The size of each step: its batch, and the length that its sequences are cut to. Imports no torch."""

from dataclasses import dataclass
from itertools import accumulate
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
    ends, length = 0, config.data.sequence_length
    for shorter, steps in config.train.length_warmup:
        ends += steps
        if step <= ends:
            length = shorter
            break
    return StepSize(batch_of(step, config.train), length)


def steps_of_its_length(step: int, train: "Train") -> int:
    """Return how many steps up to one, counted from 1, have its length: 2 for the second of them."""
    begins = accumulate((steps for _, steps in train.length_warmup), initial=0)
    return step - max(before for before in begins if before < step)


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
