"""Attention written out: the oracle for the other kernels."""

import torch
from torch import Tensor

from parallel.documents import Documents
from training.model.positions.bias import Bias


class Reference:
    """softmax(q k^T / sqrt(d) + bias) v, in one piece, in fp32 or wider.

    The only kernel that computes anything of size [heads, seq, seq], and it keeps that for the backward pass.
    """

    def __init__(self, bias: Bias) -> None:
        self.bias = bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        wide = torch.promote_types(torch.float32, q.dtype)
        scores = (q.to(wide) @ k.to(wide).mT) / q.shape[-1] ** 0.5  # [batch, local_heads, queries, keys]
        scores = scores + self.bias(rows=q.shape[2], keys=k.shape[2], device=q.device, dtype=wide)
        if documents is not None:
            outside = torch.arange(k.shape[2], device=k.device) < documents.starts[:, None, -q.shape[2] :, None]
            scores = scores.masked_fill(outside, -torch.inf)
        joined: Tensor = scores.softmax(-1) @ v.to(wide)
        return joined.to(q.dtype)
