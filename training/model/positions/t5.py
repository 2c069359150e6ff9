"""T5's positions: a learned bias per head and bucket of distance, shared by all layers. A baseline of the paper.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1: 32 buckets, the first
half exact, the rest logarithmic up to distance 128. Scores stay scaled by 1 / sqrt(head_dim), as in the ALiBi
paper's models.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from configs.positions import T5_BUCKETS
from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from parallel.shards import declare
from training.model.positions.bias import padded, power_of_two
from training.model.positions.method import PositionMethod
from training.model.windows import LosslessWindows

MAX_DISTANCE = 128


class T5(PositionMethod):
    """A learned number per head and bucket of distance."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank, with its rows of the table."""
        super().__init__(model, tensor=tensor, table=table)
        assert table is not None, "T5's positions have a learned table"
        self.bias = self.module = self._table = LearnedBias(table, tensor=tensor)

    def penalty(self, distances: int) -> Tensor:
        """Return the table's entry at each distance, [local_heads, distances] fp64."""
        entries = self._table.weight.detach().to("cpu", torch.float64)
        return entries[:, [bucket_in_integers(distance) for distance in range(distances)]]


class LearnedBias(nn.Module):
    """The bias of this tensor rank's heads, one table for all layers.

    The strip is built in each call: its gradient belongs to one forward pass.
    """

    local_slopes: Tensor | None = None
    learned = True
    causal_only = False
    lossless: LosslessWindows | None = None
    window: int | None = None

    def __init__(self, table: Shard, *, tensor: Group) -> None:
        super().__init__()
        heads, entries = table.shape
        self.weight = nn.Parameter(torch.empty(heads // tensor.size, entries))
        declare(self.weight, table)

    def slope_of(self, device: torch.device) -> None:
        """Return None: there are no slopes."""

    def forward(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads, rows, keys], -inf where the key is not seen."""
        # Round up to a power of two, so that the cache serves many generated tokens.
        seen = buckets(power_of_two(keys), device=device)[:keys][: self.window]
        by_distance = self.weight.to(dtype)[:, seen]  # [heads, distances]
        # Row r, column first + c needs distance keys - rows + r - c. Write one line of all distances, the longest
        # first, then the keys ahead. Repeat this line of width + 1 elements and cut it into rows of `width`: each
        # row is then the row above, shifted right by one.
        first, (heads, distances) = padded(rows - 1), by_distance.shape
        width, before = first + padded(keys), first - (rows - 1) + keys - distances
        other = by_distance.new_full((heads, width + 1 - distances), -torch.inf)
        line = torch.cat([other[:, :before], by_distance.flip(1), other[:, before:]], dim=1)  # [heads, width + 1]
        repeated = line[:, None, :].expand(-1, rows, -1).reshape(heads, rows * (width + 1))
        return repeated[:, : rows * width].view(heads, rows, width)[None, :, :, first : first + keys]


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
