"""Rotary positions: queries and keys rotated by an angle that grows with position. A baseline of the paper.

Source: Su et al., "RoFormer", 2021, section 3.4.2, with the halves of a head paired as in GPT-NeoX and Llama.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from configs.scales import Scaling, scaled_rates
from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.model.positions.method import PositionMethod
from training.model.positions.rows import Start, rows_of

BASE = 10000.0


class Rotary(PositionMethod):
    """Rotate queries and keys, but not values, so that the output holds no position."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank; there is no table."""
        super().__init__(model, tensor=tensor, table=table)
        self._head_dim = model.head_dim
        self.scale(None)

    def scale(self, scaling: Scaling | None) -> None:
        """Take the rates of all pairs of dimensions, scaled if there is a scaling; before the first call."""
        self._rates = tuple(scaled_rates(rotary_rates(self._head_dim), scaling))
        self._gain = 1.0 if scaling is None else scaling.gain

    def rotate(self, q: Tensor, k: Tensor, *, start: Start) -> tuple[Tensor, Tensor]:
        """Return queries and keys [batch, local_heads, seq, head_dim], rotated by their positions from `start` on."""
        q, k = (rotate(x, start=start, rates=self._rates, gain=self._gain) for x in (q, k))
        return q, k


def rotary_rates(head_dim: int) -> list[float]:
    """Return the angle per token of each pair of dimensions, head_dim / 2 of them."""
    half = head_dim // 2
    rates: list[float] = (BASE ** (-torch.arange(half, dtype=torch.float64) / half)).tolist()
    return rates


def rotate(x: Tensor, *, start: Start = 0, rates: Sequence[float] | None = None, gain: float = 1.0) -> Tensor:
    """Return queries or keys rotated by their positions, [batch, local_heads, seq, head_dim], in their own type.

    A score then depends on the distance of query and key alone. In memory they are [seq, batch, local_heads, head_dim],
    as the layers give them and take attention's output: kernels write it as queries lie, and need no copy of it.

    Args:
        x: Queries or keys.
        start: Position of the first.
        rates: Angle per token of each pair of dimensions; None for those of the source.
        gain: What they are multiplied by.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    chosen = tuple(rotary_rates(x.shape[3]) if rates is None else rates)
    table = partial(turns, rates=chosen, gain=gain, device=x.device, dtype=wide)
    turn = rows_of(table, start=start, count=x.shape[2])  # [seq, 2, head_dim / 2]
    cos, sin = turn[:, None, None].unbind(3)  # [seq, 1, 1, head_dim / 2]
    first, second = x.permute(2, 0, 1, 3).to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype).permute(1, 2, 0, 3)


@lru_cache(maxsize=8)
def turns(seq: int, *, rates: tuple[float, ...], gain: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines times a gain, [seq, 2, pairs]; angles are computed in fp64, so exact at any length."""
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * torch.tensor(rates, dtype=torch.float64)
    return (gain * torch.stack([angles.cos(), angles.sin()], dim=1)).to(device, dtype)
