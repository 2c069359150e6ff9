"""The bias that a position method adds to the scores, as a strip: a sequence's last queries by all its keys.

A bias depends on distance alone, so one strip serves every block of queries: the block that ends at key k
needs the strip's last k columns. Nothing of size [seq, seq] is kept.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from configs.backends import BACKENDS
from training.model.windows import LosslessWindows

QUERY_BLOCK = BACKENDS["sdpa"].query_block
ALIGNED = 16  # elements; on a GPU torch copies a mask whose rows begin or end off a multiple of 8


SlopeOf = Callable[[Tensor], Tensor]  # this rank's numbers of heads -> their slopes, in fp32, of any shape


class Bias(Protocol):
    """The bias of one tensor rank's heads.

    Attributes:
        local_slopes: ALiBi's slopes, [local_heads] fp64, for kernels that compute the bias themselves; None if
            there are none.
        learned: Whether it has parameters.
        causal_only: Whether it adds nothing to the scores of the keys that a query sees.
        lossless: Where kernels note what share of the scores they compute. If there are slopes, they may leave out keys
            without weight. None if all scores are computed; set by `make_position`.
        window: Keys that a query sees, its own included, or None for all before it; set by `make_position`.
    """

    local_slopes: Tensor | None
    learned: bool
    causal_only: bool
    lossless: LosslessWindows | None
    window: int | None

    def slope_of(self, device: torch.device) -> SlopeOf | None:
        """Return a function for kernels that compute the bias themselves; None if there are no slopes.

        Args:
            device: Where the kernel runs.
        """
        ...

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the bias of the last `rows` queries of `keys` positions, -inf where the key is not seen.

        Args:
            rows: Queries.
            keys: Length of the sequence.
            device: Where it is needed.
            dtype: Type that it is rounded to; it is computed in fp32 or wider.
        Returns:
            [1, local_heads or 1, rows, keys].
        """
        ...


class SlopeBias:
    """ALiBi's bias; without slopes, the causal mask alone.

    Keeps one strip of QUERY_BLOCK rows for all layers and calls, and one of a single row for the next token after a
    cache.
    """

    learned = False
    lossless: LosslessWindows | None = None
    window: int | None = None

    def __init__(self, local_slopes: Tensor | None, *, slope_of: SlopeOf | None = None) -> None:
        """Take the slopes of this rank's heads, [local_heads] fp64.

        Args:
            local_slopes: The slopes; None for the causal mask alone.
            slope_of: The same slopes as a formula, of operations that a kernel can contain; without it, kernels look
                them up in a tensor.
        """
        self.local_slopes = local_slopes
        self.causal_only = local_slopes is None
        self._slope_of = slope_of
        self._strips: dict[int, Tensor] = {}
        self._tables: dict[torch.device, Tensor] = {}

    def slope_of(self, device: torch.device) -> SlopeOf | None:
        """Return the slopes as a function of the head, for a kernel on a device."""
        if self.local_slopes is None or self._slope_of is not None:
            return self._slope_of
        if device not in self._tables:
            self._tables[device] = self.local_slopes.to(device, torch.float32)
        table = self._tables[device]
        return lambda head: table[head]

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads or 1, rows, keys]."""
        if rows > QUERY_BLOCK:  # all scores at once, too large to keep
            return self._make(rows=rows, keys=keys, device=device, dtype=dtype)[None]
        height = 1 if rows == 1 else QUERY_BLOCK
        strip = self._strips.get(height)
        if strip is None or (strip.device, strip.dtype) != (device, dtype) or strip.shape[2] < keys:
            # Round the width of a single row up to a power of two, so that generation rarely recomputes it.
            width = power_of_two(keys) if rows == 1 else padded(keys)
            strip = self._strips[height] = self._make(rows=height, keys=width, device=device, dtype=dtype)
        # a smaller strip is the last rows and columns: they have the same distances
        return strip[None, :, height - rows :, strip.shape[2] - keys :]

    def _make(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        slopes = torch.zeros(1) if self.local_slopes is None else self.local_slopes
        wide = torch.promote_types(torch.float32, dtype)
        return within(causal_bias(slopes.to(device, wide), queries=rows, keys=keys), window=self.window).to(dtype)


def causal_bias(local_slopes: Tensor, *, queries: int, keys: int) -> Tensor:
    """Return the bias of the last queries of a sequence on all its keys.

    Only distances enter, never absolute positions, and always in fp32 or wider: the common form `slope * key`
    loses the sharp heads to rounding in bf16.

    Args:
        local_slopes: Slopes, [local_heads], fp32 or wider.
        queries: How many of the last positions; rows before the start of the sequence are -inf.
        keys: Length of the sequence.
    Returns:
        [local_heads, queries, keys], minus slope times distance, -inf where the key is ahead.
    """
    device = local_slopes.device
    query = torch.arange(keys - queries, keys, device=device)
    distance = query[:, None] - torch.arange(keys, device=device)[None, :]  # [queries, keys]
    bias = -local_slopes[:, None, None] * distance
    return bias.masked_fill_(distance < 0, -torch.inf)


def within(bias: Tensor, *, window: int | None) -> Tensor:
    """Return a causal bias within a sliding window, -inf where the distance is the window or more.

    Args:
        bias: Bias of a sequence's last queries on its last keys, [..., queries, keys].
        window: Keys that a query sees, its own included; None for all before it.
    """
    queries, keys = bias.shape[-2:]
    if window is None or window >= keys:
        return bias
    # the distance is keys - queries + query - key
    outside = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries - window)
    return bias.masked_fill(outside, -torch.inf)


def padded(length: int) -> int:
    """Return the smallest multiple of ALIGNED that is not below a length."""
    return -(-length // ALIGNED) * ALIGNED


def power_of_two(length: int) -> int:
    """Return the smallest power of two that is not below a length, for tables that many lengths share."""
    return 1 << (length - 1).bit_length()
