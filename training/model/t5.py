"""T5's positions: a learned bias per head and bucket of distance, shared by all layers. A baseline of the paper.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1: 32 buckets, the first
half exact, the rest logarithmic up to distance 128. Scores stay scaled by 1 / sqrt(head_dim), as in the ALiBi
paper's models.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard
from parallel.shards import declare
from training.model.bias import padded, power_of_two

BUCKETS = 32
MAX_DISTANCE = 128


@lru_cache(maxsize=8)
def buckets(length: int, *, device: torch.device) -> Tensor:
    """Return the bucket of each distance from 0 to length - 1, [length] int64."""
    distance = torch.arange(length, dtype=torch.float64)
    exact = BUCKETS // 2
    scale = (BUCKETS - exact) / torch.log(torch.tensor(MAX_DISTANCE / exact, dtype=torch.float64))
    # Floor of a logarithm: a hair keeps distances that lie on a boundary in the bucket above it.
    far = exact + (torch.log(distance.clamp(min=1) / exact) * scale + 1e-9).floor()
    return torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1)).long().to(device)


class LearnedBias(nn.Module):
    """The bias of this tensor rank's heads, one table for all layers.

    It is made anew in each call: its gradient belongs to one forward pass.
    """

    local_slopes: Tensor | None = None
    learned = True

    def __init__(self, heads: int, *, init_std: float, tensor: Group) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads // tensor.size, BUCKETS))
        declare(self.weight, Shard("positions.t5.weight", (heads, BUCKETS), "column", init_std, tied=True))

    def forward(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads, rows, keys], -inf where the key is ahead."""
        # Buckets of a power of two: each generated token has one key more.
        by_distance = self.weight.to(dtype)[:, buckets(power_of_two(keys), device=device)[:keys]]
        # Row r, column first + c needs distance keys - rows + r - c. One line of all distances, the longest first,
        # then the keys ahead; repeated one element too long and cut anew, each row lies one later than the one above.
        first, heads = padded(rows - 1), by_distance.shape[0]
        width, before = first + padded(keys), first - (rows - 1)
        other = by_distance.new_full((heads, width + 1 - keys), -torch.inf)
        line = torch.cat([other[:, :before], by_distance.flip(1), other[:, before:]], dim=1)
        repeated = line[:, None, :].expand(-1, rows, -1).reshape(heads, rows * (width + 1))
        return repeated[:, : rows * width].view(heads, rows, width)[None, :, :, first : first + keys]
