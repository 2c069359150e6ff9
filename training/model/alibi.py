"""ALiBi: a static penalty on a query-key score, proportional to their distance. Nothing learned, nothing stored.

Source: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3 and its footnotes.
"""

import math

import torch
from torch import Tensor

from parallel.axes import Group


def slopes(heads: int) -> list[float]:
    """Return the slope of every head of the model.

    A power of two n gets the geometric sequence that begins at its own ratio, 2^(-8/n). Any other
    number gets those of the power of two below, then every other one of the power of two above.
    """
    below = 2 ** int(math.log2(heads))
    first = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    between = [2.0 ** (-4.0 * (2 * head + 1) / below) for head in range(heads - below)]
    return first + between


def local_heads(heads: int, *, tensor: Group) -> range:
    """Return the global numbers of this tensor rank's heads, [rank * local, (rank + 1) * local)."""
    local = heads // tensor.size
    return range(tensor.rank * local, (tensor.rank + 1) * local)


def local_slopes(heads: int, *, tensor: Group) -> Tensor:
    """Return the slopes of this tensor rank's heads, [local_heads] fp64; rounded to fp32 where they are used."""
    mine = local_heads(heads, tensor=tensor)
    return torch.tensor(slopes(heads)[mine.start : mine.stop], dtype=torch.float64)


def causal_bias(local_slopes: Tensor, *, queries: int, keys: int) -> Tensor:
    """Return the bias of the last queries of a sequence on all its keys.

    Only distances enter, never absolute positions, and always in fp32 or wider: `slope * key` as many
    write it loses the sharp heads to rounding in bf16.

    Args:
        local_slopes: Slopes, [local_heads], fp32 or wider.
        queries: The last so many positions of the sequence; more than there are get rows of -inf in front.
        keys: Length of the sequence.
    Returns:
        [local_heads, queries, keys], slope times minus the distance, -inf where the key is ahead.
    """
    device = local_slopes.device
    query = torch.arange(keys - queries, keys, device=device)
    distance = query[:, None] - torch.arange(keys, device=device)[None, :]
    bias = -local_slopes[:, None, None] * distance
    return bias.masked_fill_(distance < 0, -torch.inf)
