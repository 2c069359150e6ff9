"""Rotary positions: queries and keys rotated by an angle that grows with position. A baseline of the paper.

Source: Su et al., "RoFormer", 2021, section 3.4.2, with the halves of a head paired as in GPT-NeoX and Llama.
"""

from functools import lru_cache

import torch
from torch import Tensor

from training.model.positions.bias import power_of_two
from training.model.positions.method import PositionMethod

BASE = 10000.0


class Rotary(PositionMethod):
    """Rotate queries and keys, but not values, so that the output holds no position."""

    def rotate(self, q: Tensor, k: Tensor, *, start: int) -> tuple[Tensor, Tensor]:
        """Return queries and keys [batch, local_heads, seq, head_dim], rotated by their positions from `start` on."""
        return rotate(q, start=start), rotate(k, start=start)


def rotate(x: Tensor, *, start: int = 0) -> Tensor:
    """Return queries or keys rotated by their positions, [batch, local_heads, seq, head_dim], in their own type.

    A score then depends on the distance of query and key alone.

    Args:
        x: Queries or keys.
        start: Position of the first.
    """
    end = start + x.shape[2]
    # Round the table's length up to a power of two, so that generation reuses it from token to token.
    wide = torch.promote_types(torch.float32, x.dtype)
    table = turns(power_of_two(end), head_dim=x.shape[3], device=x.device, dtype=wide)
    cos, sin = (part[start:end] for part in table)  # [seq, head_dim / 2]
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=8)
def turns(seq: int, *, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [seq, head_dim / 2] each; angles are computed in fp64, so exact at any length."""
    half = head_dim // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
