"""Sinusoidal positions, added to the embeddings: the paper's baseline.

Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5, in fairseq's arrangement (all
sines, then all cosines), which the ALiBi paper's models used.
"""

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from training.model.positions.method import PositionMethod
from training.model.positions.rows import Start, rows_of


class Sinusoidal(PositionMethod):
    """A fixed vector per position, added to the embedding."""

    def embed(self, x: Tensor, *, start: Start) -> Tensor:
        """Return [seq, batch, hidden]: scaled embeddings plus the vectors of positions from `start` on."""
        seq, _, hidden = x.shape
        table = rows_of(partial(sinusoids, hidden=hidden, device=x.device), start=start, count=seq)
        if table.ndim == 2:  # the same for each row of the batch
            table = table[:, None]
        # Scaled as in the source: sines of size 1 would hide the small initial embeddings.
        out: Tensor = x * hidden**0.5 + table.to(x.dtype)
        return out


@lru_cache(maxsize=4)
def sinusoids(seq: int, *, hidden: int, device: torch.device) -> Tensor:
    """Return the position vectors [seq, hidden], fp32; computed in fp64, so exact at any length."""
    half = hidden // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates[None, :]  # [seq, half]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)
