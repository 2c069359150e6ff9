"""Rotary positions: queries and keys turned by an angle that grows with position. A baseline of the paper.

Source: Su et al., "RoFormer", 2021, section 3.4.2, with the halves of a head paired as in GPT-NeoX and Llama.
"""

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10000.0


def rotate(x: Tensor) -> Tensor:
    """Return queries or keys turned by their positions, [batch, local_heads, seq, head_dim], in their own type.

    A score then depends on the distance of query and key alone.
    """
    cos, sin = turns(x.shape[2], head_dim=x.shape[3], device=x.device)
    first, second = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=8)
def turns(seq: int, *, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [seq, head_dim / 2] fp32 each; angles are made in fp64, so exact at any length."""
    half = head_dim // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates
    return angles.cos().float().to(device), angles.sin().float().to(device)
