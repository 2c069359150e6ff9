"""KERPLE's logarithmic positions: a learned bias -r1 log(1 + r2 distance) per head, shared by all layers.

Source: Chi et al., "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation", NeurIPS 2022, arXiv
2205.09921, the variant of logarithms. r1 and r2 must be positive: the table has their logarithms, where the authors'
code cuts them off at 0.01.
"""

import torch
from torch import Tensor

from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.model.positions.by_distance import LearnedBias
from training.model.positions.method import PositionMethod


class Kerple(PositionMethod):
    """A penalty that grows with the logarithm of the distance, at a learned rate."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank, with its rows of the table."""
        super().__init__(model, tensor=tensor, table=table)
        self.bias = self.module = self._table = LogarithmBias(table, tensor=tensor)

    def penalty(self, distances: int) -> Tensor:
        """Return the bias at each distance by its formula, [local_heads, distances] fp64."""
        r1, r2 = torch.exp(self._table.weight.detach().to("cpu", torch.float64)).unbind(1)
        return -r1[:, None] * torch.log(1 + r2[:, None] * torch.arange(distances))


class LogarithmBias(LearnedBias):
    """-r1 log(1 + r2 distance), of a table with the logarithms of r1 and r2."""

    def by_distance(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the bias, [local_heads, count]."""
        scale, rate = self.weight.to(dtype).exp().chunk(2, dim=1)  # [local_heads, 1] each
        return -scale * torch.log1p(rate * torch.arange(count, device=device))
