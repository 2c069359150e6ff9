"""The batch of each step: those of `train.batch_warmup`, then `train.global_batch`. Imports no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import Train


def samples_until(step: int, train: "Train") -> int:
    """Return the sequences of all steps up to one, counted from 1."""
    samples, left = 0, step
    for batch, steps in train.batch_warmup:
        taken = min(left, steps)
        samples, left = samples + taken * batch, left - taken
    return samples + left * train.global_batch


def batch_of(step: int, train: "Train") -> int:
    """Return the sequences of a step, counted from 1."""
    return samples_until(step, train) - samples_until(step - 1, train)


def batches_of(train: "Train") -> tuple[int, ...]:
    """Return the batches of a run, in their order."""
    return (*(batch for batch, _ in train.batch_warmup), train.global_batch)
