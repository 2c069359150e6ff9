"""Sinusoidal positions, added to the embeddings: the paper's baseline.

Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5, in fairseq's arrangement (all
sines, then all cosines), which the ALiBi paper's models used.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def sinusoids(seq: int, *, hidden: int, device: torch.device) -> Tensor:
    """Return the position vectors [seq, hidden], fp32; computed in fp64, so exact at any length."""
    half = hidden // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)
