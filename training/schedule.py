"""The learning rate as a pure function of the step: linear warm-up, then the schedule that the run file names.

The warm-up counts steps. The fall counts sequences, so that with `train.batch_warmup` it follows the tokens.
"""

import math

from configs.schedules import SCHEDULES, cooldown_steps, schedule_steps
from configs.schema import Train
from configs.step_sizes import samples_until


def learning_rate(step: int, *, train: Train) -> float:
    """Return the learning rate of a step, counted from 1; past the schedule's end it stays at the minimum.

    Of the keys that may change between two starts of a run, it depends on those of `first_changed_step` alone;
    `decay_steps` must be set.
    """
    assert train.decay_steps is not None, "decay_steps is fixed at the first start of a run"
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    schedule = SCHEDULES[train.schedule]
    begins = schedule.fall_begins(train)
    if begins is None or step <= begins:
        return train.learning_rate
    first, now, end = (samples_until(each, train) for each in (begins, step, train.decay_steps))
    left: float = schedule.load()(min((now - first) / (end - first), 1.0))
    return train.min_learning_rate + left * (train.learning_rate - train.min_learning_rate)


def half_cosine(progress: float) -> float:
    """Return the share of the fall that is left along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def straight_line(progress: float) -> float:
    """Return the share of the fall that is left along a line."""
    return 1.0 - progress


def first_changed_step(before: Train, now: Train) -> int | None:
    """Return the first step whose learning rate changes with train.decay_steps and train.cooldown_steps; None if none.

    All other keys of the schedule must be the same. No step is tried: until the fall begins, the rate depends on
    neither key, and from then on two falls of other lengths differ.
    """
    if (schedule_steps(before), cooldown_steps(before)) == (schedule_steps(now), cooldown_steps(now)):
        return None
    begins = [SCHEDULES[train.schedule].fall_begins(train) for train in (before, now)]
    return min((max(step, 0) + 1 for step in begins if step is not None), default=None)


def zero_from(train: Train) -> int | None:
    """Return the step from which on the learning rate is 0; None if it stays above."""
    falls_to_zero = SCHEDULES[train.schedule].falls and not train.min_learning_rate
    return schedule_steps(train) if falls_to_zero else None
