"""Rotary positions: queries and keys rotated by an angle that grows with position. A baseline of the paper.

Source: Su et al., "RoFormer", 2021, section 3.4.2, with the halves of a head paired as in GPT-NeoX and Llama.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from training.model.positions.method import PositionMethod
from training.model.positions.rows import Start, rows_of

BASE = 10000.0


class Rotary(PositionMethod):
    """Rotate queries and keys, but not values, so that the output holds no position."""

    def rotate(self, q: Tensor, k: Tensor, *, start: Start) -> tuple[Tensor, Tensor]:
        """Return queries and keys [batch, local_heads, seq, head_dim], rotated by their positions from `start` on."""
        return rotate(q, start=start), rotate(k, start=start)


def rotate(x: Tensor, *, start: Start = 0) -> Tensor:
    """Return queries or keys rotated by their positions, [batch, local_heads, seq, head_dim], in their own type.

    A score then depends on the distance of query and key alone.

    Args:
        x: Queries or keys.
        start: Position of the first.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    table = partial(turns, head_dim=x.shape[3], device=x.device, dtype=wide)
    cos, sin = rows_of(table, start=start, count=x.shape[2]).unbind(1)  # [seq, head_dim / 2]
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=8)
def turns(seq: int, *, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines, [seq, 2, head_dim / 2]; angles are computed in fp64, so exact at any length."""
    half = head_dim // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=1).to(device, dtype)
