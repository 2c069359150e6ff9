"""Notice that training has diverged. Imports no torch."""

import math
from collections import deque
from collections.abc import Iterable

from configs.schema import Train
from configs.step_sizes import steps_of_its_length
from training.state import TrainState

SPIKE_STEPS = 10  # one bad batch is no divergence
BASE_STEPS = 100  # before them
LOSSES_WATCHED = BASE_STEPS + SPIKE_STEPS


class Diverged(Exception):
    """Training has diverged.

    Attributes:
        began: First of the steps in which it shows: a checkpoint of an earlier step is good.
        state: The position of training after the last of them.
    """

    def __init__(self, why: str, *, began: int, state: TrainState) -> None:
        super().__init__(why)
        self.began, self.state = began, state


class LossWatch:
    """Looks at each step's loss and gradient norm; given the same ones, every rank comes to the same result.

    Args:
        train: Section of the run. `spike` is how far `SPIKE_STEPS` losses in a row must lie above the mean of the
            `BASE_STEPS` before them to count as divergence, in nats; None to look for what is not finite alone. Losses
            of sequences of other lengths do not compare: at a longer one, positions may be new to the model.
        losses: Those of the last steps before the first one that is checked.
    """

    def __init__(self, train: Train, losses: Iterable[float] = ()) -> None:
        self._train, self._rise = train, train.spike
        self._losses = deque(losses, maxlen=LOSSES_WATCHED)

    def check(self, state: TrainState, *, loss: float, grad_norm: float) -> None:
        """Take the figures of a step.

        Args:
            state: The position of training after it.
            loss: Its loss.
            grad_norm: Its gradient norm, before clipping.
        Raises:
            Diverged: training has diverged.
        """
        step = state.step
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            why = f"the loss is {loss} and the gradient norm {grad_norm} at step {step}"
            raise Diverged(why, began=step, state=state)
        if self._rise is None:
            return
        self._losses.append(loss)
        losses = [*self._losses][-steps_of_its_length(step, self._train) :]
        before, last = losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]
        if len(before) < SPIKE_STEPS:
            return
        mean = sum(before) / len(before)
        if min(last) > mean + self._rise:
            why = (
                f"the loss is {loss:.4f} at step {step}: {SPIKE_STEPS} in a row lie more than train.spike "
                f"({self._rise:g}) above {mean:.4f}, the mean of the {len(before)} before"
            )
            raise Diverged(why, began=step - SPIKE_STEPS + 1, state=state)
