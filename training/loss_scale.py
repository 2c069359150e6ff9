"""The loss scale of fp16, as a pure function of the position of training. Imports no torch.

fp16 has no number between 0 and 6e-8, where many gradients lie. So the loss is multiplied by a power of two, the
gradients with it, and they are divided by it in fp32 before the optimizer takes them (Micikevicius et al. 2018). The
engine halves a scale with which gradients overflow and takes the same step again: no step is left out, so the losses
and the samples of a run do not depend on when it does.
"""

from configs.precisions import PRECISIONS
from configs.schema import Train
from training.state import TrainState

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 1000  # after which a larger scale is tried


def loss_scale(state: TrainState, *, train: Train) -> float | None:
    """Return the factor of the loss for the step after a position; None in a precision that needs none."""
    if not PRECISIONS[train.precision].scales_loss:
        return None
    if state.loss_scale is None:
        return FIRST_SCALE
    return state.loss_scale * (1 if state.step % GROWTH_STEPS else 2)
