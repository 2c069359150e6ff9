"""How far back each head needs keys: the windows of queries and keys, drawn ones or a trained model's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.model.attention import AttentionBlock
from training.model.observed import observed_attention
from training.model.positions.bias import QUERY_BLOCK, causal_bias
from training.model.windows import norms, reach

_SUMMED_KEYS = 2 * QUERY_BLOCK  # last keys of a block whose weights are summed up, as kernels do


@dataclass(frozen=True)
class HeadWindow:
    """The window of one head: the tokens that a query needs, itself included, at most all before it.

    Attributes:
        head: Number of the head.
        slope: Its slope.
        median, largest: Over the queries, in tokens.
        share: Share of the causal scores of these queries that lie within their windows.
    """

    head: int
    slope: float
    median: int
    largest: int
    share: float


@dataclass(frozen=True)
class LayerWindows:
    """One block's windows.

    Attributes:
        layer: Its place among the blocks.
        density: Share of the causal scores that its attention computed, in whole blocks of keys; None if its kernel
            does not count them.
        heads: Its heads, by number.
    """

    layer: int
    density: float | None
    heads: tuple[HeadWindow, ...]


def windows_in_tokens(q: Tensor, k: Tensor, *, slopes: Tensor) -> Tensor:
    """Return the tokens that each query needs, [batch, heads, queries] int64, at least 1.

    Args:
        q: [batch, heads, queries, head_dim], the last positions of the keys.
        k: [batch, heads, keys, head_dim].
        slopes: [heads].
    """
    queries, keys = q.shape[2], k.shape[2]
    largest = norms(k).cummax(2).values  # norm up to each key
    slopes = slopes.to(largest)  # once: each copy waits for a GPU
    windows = []
    for start in range(0, queries, QUERY_BLOCK):
        rows = q[:, :, start : start + QUERY_BLOCK]
        seen = keys - queries + start + rows.shape[2]
        first = max(0, seen - _SUMMED_KEYS)
        wide = largest.dtype
        scores = rows.to(wide) @ k[:, :, first:seen].to(wide).mT / q.shape[3] ** 0.5
        bias = causal_bias(slopes, queries=rows.shape[2], keys=seen - first)
        sums = (scores + bias).logsumexp(-1)
        distances = reach(rows, radius=largest[:, :, seen - 1 : seen], sums=sums, slopes=slopes)
        before = torch.arange(seen - rows.shape[2] + 1, seen + 1, device=q.device)  # tokens up to each query
        windows.append(torch.minimum(distances.nan_to_num(nan=torch.inf).ceil().clamp(min=1), before).long())
    return torch.cat(windows, dim=2)


def head_windows(q: Tensor, k: Tensor, *, slopes: Tensor, heads: Sequence[int]) -> tuple[HeadWindow, ...]:
    """Return each head's window.

    Args:
        q: [batch, heads, queries, head_dim], the last positions of the keys.
        k: [batch, heads, keys, head_dim].
        slopes: [heads].
        heads: Their numbers.
    """
    windows = windows_in_tokens(q, k, slopes=slopes).transpose(0, 1).flatten(1)  # [heads, batch * queries]
    seen = torch.arange(k.shape[2] - q.shape[2] + 1, k.shape[2] + 1).sum().item() * q.shape[0]
    return tuple(
        HeadWindow(head, float(slope), int(window.median()), int(window.max()), int(window.sum()) / seen)
        for head, slope, window in zip(heads, slopes, windows.cpu(), strict=True)
    )


def windows_of_weights(blocks: Sequence[AttentionBlock], run: Callable[[], object]) -> tuple[LayerWindows, ...]:
    """Return the windows of a model's blocks on a text.

    Args:
        blocks: All blocks, in order; their bias has slopes.
        run: Gives the text to the model, once.
    """
    counted = blocks[0].attend.bias.lossless
    slopes = [block.attend.bias.local_slopes for block in blocks]
    heads: list[tuple[HeadWindow, ...]] = [()] * len(blocks)

    def see(layer: int, q: Tensor, k: Tensor) -> None:
        of_layer = slopes[layer]
        assert of_layer is not None, "windows come from slopes"
        heads[layer] = head_windows(q, k, slopes=of_layer, heads=range(q.shape[1]))

    with observed_attention(blocks, see):
        if counted is not None:
            counted.take()
        run()
        densities = [float(density) for density in counted.take()] if counted is not None else []
    return tuple(LayerWindows(layer, densities[layer] if densities else None, each) for layer, each in enumerate(heads))
