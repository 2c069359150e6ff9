"""T5's positions: a learned bias per head and bucket of distance, shared by all layers. A baseline of the paper.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1: 32 buckets, the first
half exact, the rest logarithmic up to distance 128. Scores stay scaled by 1 / sqrt(head_dim), as in the ALiBi
paper's models.
"""

from functools import lru_cache

import torch
from torch import Tensor

from configs.positions import T5_BUCKETS
from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.model.positions.bias import power_of_two
from training.model.positions.by_distance import LearnedBias
from training.model.positions.method import PositionMethod

MAX_DISTANCE = 128


class T5(PositionMethod):
    """A learned number per head and bucket of distance."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank, with its rows of the table."""
        super().__init__(model, tensor=tensor, table=table)
        self.bias = self.module = self._table = BucketBias(table, tensor=tensor)

    def penalty(self, distances: int) -> Tensor:
        """Return the table's entry at each distance, [local_heads, distances] fp64."""
        entries = self._table.weight.detach().to("cpu", torch.float64)
        return entries[:, [bucket_in_integers(distance) for distance in range(distances)]]


class BucketBias(LearnedBias):
    """The entry of each distance's bucket."""

    def by_distance(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the entries, [local_heads, count]."""
        # Round up to a power of two, so that the cache serves many generated tokens.
        return self.weight.to(dtype)[:, buckets(power_of_two(count), device=device)[:count]]


@lru_cache(maxsize=8)
def buckets(length: int, *, device: torch.device) -> Tensor:
    """Return the bucket of each distance from 0 to length - 1, [length] int64."""
    distance = torch.arange(length, dtype=torch.float64)
    exact = T5_BUCKETS // 2
    scale = (T5_BUCKETS - exact) / torch.log(torch.tensor(MAX_DISTANCE / exact, dtype=torch.float64))
    # Add 1e-9 so that a distance on a bucket's boundary does not round down.
    far = exact + (torch.log(distance.clamp(min=1) / exact) * scale + 1e-9).floor()
    return torch.where(distance < exact, distance, far.clamp(max=T5_BUCKETS - 1)).long().to(device)


def bucket_in_integers(distance: int) -> int:
    """Return the bucket of a distance without a logarithm: the promise must not repeat the rounding of `buckets`."""
    exact = T5_BUCKETS // 2
    # exact + floor(exact * log(distance / exact) / log(ratio)), both sides of each bound raised to the power `exact`.
    bounds = [exact**exact * (MAX_DISTANCE // exact) ** step for step in range(1, exact)]
    return min(distance, exact) + sum(1 for bound in bounds if bound <= distance**exact)
