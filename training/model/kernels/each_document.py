"""Attention inside documents, for kernels that take no mask of them: each document by itself."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from parallel.documents import Documents
from training.model.positions.bias import QUERY_BLOCK, Bias, padded
from training.model.windows import LosslessWindows


class SharedStrip:
    """A bias whose strip is computed at its first use, for the longest document, and serves all of an attention.

    A learned bias is a module, whose table ZeRO-3 partitions: all data ranks must call it equally often, and each has
    other documents.
    """

    def __init__(self, bias: Bias, *, longest: int) -> None:
        """Take a bias.

        Args:
            bias: One without slopes.
            longest: Tokens of the longest document.
        """
        self.local_slopes: Tensor | None = None
        self.learned, self.causal_only = bias.learned, bias.causal_only
        self.lossless: LosslessWindows | None = bias.lossless
        self.window: int | None = bias.window
        self._bias, self._longest, self._strip = bias, longest, torch.empty(0)

    def slope_of(self, device: torch.device) -> None:
        """Return None: there are no slopes."""

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads, rows, keys]; `device` and `dtype` are the same in each call."""
        if not self._strip.numel():
            height = min(self._longest, QUERY_BLOCK)
            width = min(self._longest, padded(height + (self.window or self._longest) - 1))
            self._strip = self._bias(rows=height, keys=width, device=device, dtype=dtype)
        # a smaller strip is the last rows and columns: they have the same distances
        return self._strip[:, :, self._strip.shape[2] - rows :, self._strip.shape[3] - keys :]


def attend_each(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    bias: Bias,
) -> Tensor:
    """Return the attention of each document, computed as if it were alone.

    Args:
        attend: Attention of a whole sequence.
        q: [batch, local_heads, seq, head_dim].
        k: Like q.
        v: Like q.
        documents: The documents.
        bias: The bias of the attention, which counts the scores.
    Returns:
        [batch, local_heads, seq, head_dim], in memory [seq, batch, local_heads, head_dim].
    """
    batch, seq = documents.starts.shape
    if len(documents.lengths) == sum(map(len, documents.lengths)):
        return attend(q, k, v)
    scores = [_causal_scores(length) for row in documents.lengths for length in row]
    counted = bias.lossless and bias.lossless.as_one(scores, of=batch * _causal_scores(seq))
    rows = []
    with counted or nullcontext():
        # Split, not sliced: a slice has a gradient as large as the whole.
        for lengths, *given in zip(documents.lengths, q.unbind(), k.unbind(), v.unbind(), strict=True):
            parts = zip(*(torch.split(x[None], lengths, dim=2) for x in given), strict=True)
            rows.append(torch.cat([attend(*part).permute(2, 0, 1, 3) for part in parts]))
    return torch.cat(rows, dim=1).permute(1, 2, 0, 3)


def _causal_scores(length: int) -> int:
    return length * (length + 1) // 2
