"""Attention inside documents, for kernels that take no mask of them: each document by itself."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from parallel.documents import Documents
from training.model.positions.bias import Bias
from training.model.positions.by_distance import CalledOnce


def attend_each(
    kernel: Callable[[Bias], Callable[[Tensor, Tensor, Tensor], Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    bias: Bias,
) -> Tensor:
    """Return the attention of each document, computed as if it were alone.

    Args:
        kernel: Makes attention of a whole sequence of a bias.
        q: [batch, local_heads, seq, head_dim].
        k: Like q.
        v: Like q.
        documents: The documents.
        bias: The bias, which counts the scores.
    Returns:
        [batch, local_heads, seq, head_dim], in memory [seq, batch, local_heads, head_dim].
    """
    attend = kernel(CalledOnce(bias, longest=documents.longest) if bias.learned else bias)
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
