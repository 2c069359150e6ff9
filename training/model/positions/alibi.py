"""ALiBi: a static penalty on a query-key score, proportional to their distance. Nothing learned, nothing stored.

Source: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3 and its footnotes.
"""

import math

import torch
from torch import Tensor

from configs.positions import ALIBI_BIAS_MAX, slopes
from configs.scales import Scaling, scaled_rates
from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.model.positions.bias import SlopeBias, SlopeOf
from training.model.positions.method import PositionMethod, local_heads


class Alibi(PositionMethod):
    """Add minus the head's slope times the distance to each score."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank; there is no table."""
        super().__init__(model, tensor=tensor, table=table)
        self._model, self._tensor = model, tensor
        self.scale(None)

    def scale(self, scaling: Scaling | None) -> None:
        """Take the slopes of all heads, scaled if there is a scaling; before the first call."""
        heads, bias_max = self._model.heads, self._model.alibi_bias_max
        # Scaled slopes are read from a table: a compiled kernel would keep the numbers of the first factor.
        formula = slope_formula(heads, first=self.heads.start, bias_max=bias_max) if scaling is None else None
        mine = local_slopes(heads, tensor=self._tensor, bias_max=bias_max, scaling=scaling)
        self.bias = SlopeBias(mine, slope_of=formula)
        self._all_slopes = scaled_rates(slopes(heads, bias_max=bias_max), scaling)

    def penalty(self, distances: int) -> Tensor:
        """Return minus slope times distance, [local_heads, distances] fp64."""
        slope = torch.tensor([self._all_slopes[head] for head in self.heads], dtype=torch.float64)
        return -slope[:, None] * torch.arange(distances)


def slope_formula(heads: int, *, first: int, bias_max: int = ALIBI_BIAS_MAX) -> SlopeOf:
    """Return the slopes of a tensor rank's heads as a function that a kernel can contain.

    It has no tensor of its own, and exponents are exact in fp32: the slopes are those of `slopes`, rounded to fp32.

    Args:
        heads: Heads of the model.
        first: Global number of the rank's first head.
        bias_max: Value of `model.alibi_bias_max`.
    """
    below = 2 ** int(math.log2(heads))

    def slope_of(head: Tensor) -> Tensor:
        number = head + first
        # in units of bias_max / 2 / below: 2, 4, 6, ... up to the power of two, then 1, 3, 5, ...
        units = torch.where(number < below, 2 * number + 2, 2 * (number - below) + 1)
        return torch.exp2(units * (-bias_max / 2 / below))

    return slope_of


def local_slopes(
    heads: int, *, tensor: Group, bias_max: int = ALIBI_BIAS_MAX, scaling: Scaling | None = None
) -> Tensor:
    """Return the slopes of this tensor rank's heads, [local_heads] fp64; rounded to fp32 where they are used."""
    mine = local_heads(heads, tensor=tensor)
    # how a slope is scaled may depend on those of all heads
    every = scaled_rates(slopes(heads, bias_max=bias_max), scaling)
    return torch.tensor(every[mine.start : mine.stop], dtype=torch.float64)
