"""Attention of the next token to the keys in fixed buffers: to all, or on a GPU to those that have weight.

The token's position is on the device, so that a captured graph reads it at each replay.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from parallel.compilers import missing_compiler
from parallel.start import environment
from training.model.positions.bias import Bias, power_of_two
from training.model.windows import share_limit

FEWEST_KEYS = 4096  # in smaller buffers, products with all keys take little of a token's time
NEAREST_KEYS = 32  # whose weights bound the query's sum of weights
_TILE = 64  # keys that a program takes at once
_PROGRAMS, _MOST_PARTS = 512, 64  # enough for all processors of a GPU


class NextAttention(Protocol):
    """Attention of one query a sequence to the keys up to its own."""

    def begin(self, position: Tensor) -> None:
        """Prepare what all blocks share.

        Args:
            position: Number of the query's own key, [1] int64.
        """
        ...

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, *, position: Tensor, radius: Tensor | None) -> Tensor:
        """Return [batch, local_heads, 1, head_dim], in the values' type.

        Args:
            q: [batch, local_heads, 1, head_dim].
            keys: Buffer, [batch, local_heads, size, head_dim]; those after the query's own have no weight.
            values: Like keys.
            position: Number of the query's own key, [1] int64.
            radius: Largest norm of a key before the query's own, or more, [batch, local_heads, 1] fp32: a kernel that
                leaves out keys without weight by it raises it to that of the query's own key too. None to take all.
        """
        ...


def next_attention(bias: Bias, keys: Tensor) -> NextAttention:
    """Return the attention with a bias for buffers of keys like these, [batch, local_heads, size, head_dim]."""
    return Parts(bias, keys) if takes_parts(bias, keys) else AllKeys(bias, keys)


def takes_parts(bias: Bias, keys: Tensor) -> bool:
    """Return whether `Parts` computes a bias on buffers of keys like these, and is worth it."""
    is_known = bias.causal_only or bias.local_slopes is not None
    if not (is_known and keys.is_cuda and keys.shape[2] >= FEWEST_KEYS):
        return False
    return missing_compiler("cuda", environ=environment()) is None


class AllKeys:
    """Products with the whole buffer, for any bias."""

    def __init__(self, bias: Bias, keys: Tensor) -> None:
        """Take a bias, and buffers like those to come."""
        size = keys.shape[2]
        # The last query's row, then as many keys ahead of it. That of position p begins at size - 1 - p.
        wide = torch.promote_types(torch.float32, keys.dtype)
        row = bias(rows=1, keys=size, device=keys.device, dtype=wide)  # [1, local_heads or 1, 1, size]
        self._rows = torch.cat([row, torch.full_like(row, -torch.inf)], dim=3)
        self._columns = torch.arange(size - 1, 2 * size - 1, device=keys.device)
        self._row = row

    def begin(self, position: Tensor) -> None:
        """Look up the bias of a position."""
        self._row = self._rows.index_select(3, self._columns - position)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, *, position: Tensor, radius: Tensor | None) -> Tensor:
        """Return the attention; `begin` has been told the position."""
        # Written out: the kernels that take a bias let each head's keys wait for each other, at 8 to 28 times the time.
        scores = torch.add(self._row, _products(q, keys), alpha=q.shape[3] ** -0.5)  # [batch, heads, 1, size]
        return scores.softmax(3).to(values.dtype) @ values


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """Return the products of one query with keys, [batch, heads, 1, size], in fp32 or wider, as scores need it."""
    wide = torch.promote_types(torch.float32, q.dtype)
    if q.dtype == wide or not q.is_cuda:
        return q.to(wide) @ keys.to(wide).mT
    return torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=wide).view(*q.shape[:3], -1)


class Parts:
    """Triton kernels that read only what they need, for slopes or no bias; in Triton's interpreter for tests.

    Each head's keys are shared out among programs. Each of these derives from the query, its nearest keys and the
    largest norm of a key where weight begins, as `windows.reach` says, and takes its part of the keys from there on.
    """

    def __init__(self, bias: Bias, keys: Tensor) -> None:
        """Take a bias, and buffers like those to come."""
        self._window = bias.window
        slopes = torch.zeros(keys.shape[1]) if bias.local_slopes is None else bias.local_slopes
        slopes = slopes.to(keys.device, torch.float64)
        # Slopes, and the logarithms of the sums of exp(-slope distance) over all distances.
        self._series = torch.stack([slopes, -(-torch.expm1(-slopes)).log()]).float()

    def begin(self, position: Tensor) -> None:
        """Do nothing: each program reads the position."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, *, position: Tensor, radius: Tensor | None) -> Tensor:
        """Return the attention, and raise the radius."""
        from training.model.kernels.next_token_triton import attend_part, join_parts  # Triton comes with torch for CUDA

        (batch, heads, _, head_dim), size = q.shape, keys.shape[2]
        width = power_of_two(head_dim)
        count = _parts(batch * heads, size)
        parts = q.new_empty(batch * heads, count, head_dim, dtype=torch.float32)
        sums = q.new_empty(batch * heads, count, dtype=torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        attend_part[(count, batch * heads)](
            *(q, keys, values, position, radius, self._series, parts, sums),
            *(*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], heads),
            *(size if self._window is None else self._window, head_dim**-0.5, math.log(share_limit(q.dtype))),
            HEAD_DIM=head_dim,
            WIDTH=width,
            TILE=_TILE,
            NEAREST=NEAREST_KEYS,
        )
        join_parts[(batch * heads,)](parts, sums, out, HEAD_DIM=head_dim, WIDTH=width, COUNT=count)
        return out


def _parts(heads: int, size: int) -> int:
    """Return into how many parts the keys of each head are split, a power of two.

    Args:
        heads: Heads of all sequences.
        size: Keys in a buffer.
    """
    wanted = max(1, min(_PROGRAMS // heads, size // _TILE, _MOST_PARTS))
    return 1 << (wanted.bit_length() - 1)
