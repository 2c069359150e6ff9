"""What a position method adds to the scores, as a strip: the last queries of a sequence on all its keys.

A bias depends on distance alone, so one strip serves every block of queries: the block that ends at key k
needs the strip's last k columns. Nothing of size [seq, seq] is kept.
"""

from typing import Protocol

import torch
from torch import Tensor

from training.model.alibi import causal_bias

QUERY_BLOCK = 256


class Bias(Protocol):
    """The bias of one tensor rank's heads.

    Attributes:
        local_slopes: ALiBi's slopes, [local_heads] fp64, for kernels that compute the bias themselves; None where
            nothing but causality is added, or where the bias is learned.
        learned: Whether it has parameters.
    """

    local_slopes: Tensor | None
    learned: bool

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the bias of the last `rows` queries of `keys` positions, -inf where the key is ahead.

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
    """ALiBi's bias; with no slopes, causality alone. A strip of QUERY_BLOCK rows is kept, for all layers and calls."""

    learned = False

    def __init__(self, local_slopes: Tensor | None) -> None:
        self.local_slopes = local_slopes
        self._strip: Tensor | None = None

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads or 1, rows, keys]."""
        if rows == 1 or rows > QUERY_BLOCK:  # a cache's next token, or every score at once: nothing worth keeping
            return self._make(rows=rows, keys=keys, device=device, dtype=dtype)[None]
        strip = self._strip
        if strip is None or (strip.device, strip.dtype) != (device, dtype) or strip.shape[2] < keys:
            self._strip = strip = self._make(rows=QUERY_BLOCK, keys=keys, device=device, dtype=dtype)
        return strip[None, :, QUERY_BLOCK - rows :, strip.shape[2] - keys :]

    def _make(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        slopes = torch.zeros(1) if self.local_slopes is None else self.local_slopes
        wide = torch.promote_types(torch.float32, dtype)
        return causal_bias(slopes.to(device, wide), queries=rows, keys=keys).to(dtype)
