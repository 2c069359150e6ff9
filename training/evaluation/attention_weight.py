"""How far back attention looks: the share of each head's weight that lies on the nearest keys.

It is computed from queries and keys, whatever kernel the model runs with, for a few queries at the end of windows of
the longest length: they see nearly all of it. Weight on far keys need not help: the loss curves show whether it does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.evaluation.perplexity import Scorer
from training.model.attention import AttentionBlock
from training.model.observed import observed_attention
from training.model.positions.bias import Bias

_WINDOWS, _QUERIES = 4, 16  # windows of the text, and last queries of each
_SHORTEST = 16  # of the numbers of nearest keys


def weight_within(q: Tensor, k: Tensor, *, bias: Bias, nearest: Sequence[int]) -> Tensor:
    """Return the share of attention's weight on the nearest keys, mean over batch and queries, [heads, nearest] fp64.

    Args:
        q: [batch, heads, queries, head_dim], the last positions of the keys.
        k: [batch, heads, keys, head_dim].
        bias: The bias of these heads.
        nearest: Numbers of nearest keys, a query's own included.
    """
    rows, keys = q.shape[2], k.shape[2]
    places = torch.arange(keys, device=q.device)
    distances = places[keys - rows :, None] - places  # [rows, keys]
    # by distance, of the last query: a bias keeps the strip that it is asked for, and one of many rows is large
    added = bias(rows=1, keys=keys, device=q.device, dtype=torch.float32)[0, :, 0].flip(-1)  # [heads or 1, keys]
    added = added[:, distances.clamp(min=0)].masked_fill(distances < 0, -torch.inf)  # [heads or 1, rows, keys]
    weights = (q.float() @ k.float().mT / q.shape[3] ** 0.5 + added).softmax(-1).double()  # [batch, heads, rows, keys]
    shares = [(weights * (distances < number)).sum(-1).mean((0, 2)) for number in nearest]
    return torch.stack(shares, dim=1)


def measure_weights(
    scorer: Scorer, blocks: Sequence[AttentionBlock], tokens: npt.NDArray[np.integer[Any]], *, longest: int
) -> dict[str, Any]:
    """Return what a report has under `context.attention`.

    Args:
        scorer: The model.
        blocks: Its blocks, in order.
        tokens: The text, [tokens], more than `longest`.
        longest: Inputs of a window.
    """
    nearest = sorted({min(_SHORTEST * 2**power, longest) for power in range(longest.bit_length())})
    starts = np.unique(np.linspace(0, len(tokens) - longest - 1, _WINDOWS).astype(np.int64))
    shares: list[list[Tensor]] = [[] for _ in blocks]

    def see(layer: int, q: Tensor, k: Tensor) -> None:
        bias = blocks[layer].attend.bias
        shares[layer].append(weight_within(q[:, :, -_QUERIES:], k, bias=bias, nearest=nearest))

    with observed_attention(blocks, see):
        for start in starts:
            scorer.losses(torch.from_numpy(tokens[start : start + longest + 1].astype(np.int64))[None], last=1)
    return {
        "nearest": nearest,
        "queries": len(starts) * min(_QUERIES, longest),
        "share_by_layer_and_head": [torch.stack(each).mean(0).tolist() for each in shares],
    }
