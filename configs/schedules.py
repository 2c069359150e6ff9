"""Schedules of the learning rate: what rules, checks and the trainer need to know of each. Imports no torch.

The curves are in `training/schedule.py`. To add a schedule, write its curve there and a row here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.choices import Choice

if TYPE_CHECKING:
    from configs.schema import Train

_COOLDOWN_PART = 5  # of the schedule's steps, unless train.cooldown_steps is set


@dataclass(frozen=True)
class Schedule(Choice):
    """How the learning rate falls from train.learning_rate, after the warm-up, to train.min_learning_rate.

    `implementation` is the curve of the fall: a function from the part of its steps that is over, 0 to 1, to the share
    of the fall that is left, 1 to 0. None for a rate that never falls.

    Attributes:
        cools_down: Whether it falls in the last train.cooldown_steps alone, not from the end of the warm-up on.
    """

    cools_down: bool = False

    @property
    def falls(self) -> bool:
        """Whether the learning rate falls at all."""
        return self.implementation is not None

    def fall_begins(self, train: "Train") -> int | None:
        """Return the last step before the learning rate falls; None if it never does."""
        if not self.falls:
            return None
        return schedule_steps(train) - cooldown_steps(train) if self.cools_down else train.warmup_steps


SCHEDULES = {
    row.name: row
    for row in (
        Schedule("cosine", "training.schedule.half_cosine"),
        Schedule("linear", "training.schedule.straight_line"),
        Schedule("constant", None),
        Schedule("wsd", "training.schedule.straight_line", cools_down=True),
    )
}


def schedule_steps(train: "Train") -> int:
    """Return the step at which the fall ends: train.decay_steps, which the first start of a run sets to train.steps."""
    return train.decay_steps or train.steps


def cooldown_steps(train: "Train") -> int:
    """Return the steps of the cooldown, of a schedule that has one."""
    return train.cooldown_steps or max(1, schedule_steps(train) // _COOLDOWN_PART)
