"""Attention by torch's FlexAttention, compiled on a GPU; the bias is computed inside the kernel."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.backends import BACKENDS
from parallel.documents import Documents
from training.model.kernels.sdpa import Sdpa
from training.model.kernels.slopes import DeviceSlopes
from training.model.kernels.tiles import (
    TILE,
    block_mask,
    compiled_finder,
    mask_of_all,
    mask_of_documents,
    rows_from,
    starts_in_tiles,
    tiles_with_weight,
)
from training.model.positions.bias import Bias

FEWEST_TILES = 2  # torch compiles again for a size of 1
# Finding tiles without weight reads all queries and keys once: in shorter sequences that costs about what it saves.
FEWEST_TILES_OF_WINDOWS = -(-BACKENDS["flex"].shortest // TILE)


class Flex:
    """FlexAttention; no tensor holds a bias, and its slopes come from the number of the head.

    Sequences are padded to whole tiles: at other lengths compiled FlexAttention has given NaN gradients
    (pytorch#153799). Training has one shape, and a kernel compiled for it alone: one for any shape was seen to take 1.7
    times its time. Without gradients one compilation serves all lengths. With windows, tiles without weight are left
    out: how many a row of tiles takes is data, so that nothing is compiled again, and the host never waits for it.

    Attributes:
        bias: The bias.
        options: What FlexAttention is told about its kernel.
        any_length: Whether one compilation of the kernel serves many lengths.
    """

    # All lengths are whole tiles, which a compilation for many lengths cannot know.
    options: ClassVar[dict[str, Any]] = {"IS_DIVISIBLE": True}
    any_length: ClassVar[bool] = True

    def __init__(self, bias: Bias, *, compiled: bool | None = None) -> None:
        """Take a bias.

        Args:
            bias: One whose slopes are a function of the head.
            compiled: Whether to compile the kernel; by default, on a GPU only. On a CPU it has no backward pass.
        """
        self.bias, self._compiled, self._one_query = bias, compiled, Sdpa(bias)
        self._slopes = DeviceSlopes(bias)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]; a single query after a cache is left to SDPA."""
        queries, keys = q.shape[2], k.shape[2]
        if queries == 1 < keys:
            return self._one_query(q, k, v)
        tiles = max(FEWEST_TILES, -(-keys // TILE))
        end = tiles * TILE - keys
        trains = torch.is_grad_enabled() and q.requires_grad
        one_shape = trains or not self.any_length
        # Queries after a cache take their own places in the sequence; of the rows before them a kernel computes little.
        q, k, v = _padded(q, keys - queries, end), _padded(k, 0, end), _padded(v, 0, end)
        compiled = q.is_cuda if self._compiled is None else self._compiled
        if compiled and not one_shape:
            q, k, v = (x.contiguous() for x in (q, k, v))  # so that the kernel knows what strides are multiples of
        first = 0 if trains else (keys - queries) // TILE
        mask, density = self._mask(q, k, tiles=tiles, first=first, documents=documents)
        if self.bias.lossless is not None:
            self.bias.lossless.add(density)
        attended: Tensor = flex_kernel(compiled, one_shape)(
            q,
            k,
            v,
            score_mod=penalty(self.bias.slope_of(q.device)),
            block_mask=mask,
            kernel_options=self.options,
        )
        out = attended.permute(1, 2, 0, 3)
        return out if end == 0 and queries == keys else out[:, :, keys - queries : keys]

    @torch.no_grad()
    def _mask(self, q: Tensor, k: Tensor, *, tiles: int, first: int, documents: Documents | None) -> tuple[Any, Tensor]:
        """Return FlexAttention's block mask of a call, and what share of the causal tiles of its rows it leaves.

        Args:
            q: Queries in whole tiles, [batch, local_heads, tiles * TILE, head_dim].
            k: Like q.
            tiles: How many.
            first: The first row of tiles that has queries; not 0 only without a backward pass.
            documents: Those that attention stays inside of.
        """
        slopes, window = self._slopes.on(q.device), self.bias.window
        if self.bias.lossless is None or slopes is None or tiles < FEWEST_TILES_OF_WINDOWS:
            if documents is None:
                return mask_of_all(*q.shape[:2], tiles, window=window, device=q.device, first=first)
            return mask_of_documents(documents, tiles, heads=q.shape[1], window=window)
        starts = None if documents is None else starts_in_tiles(documents, tiles)
        q, k = (x.detach().view(*x.shape[:2], tiles, TILE, -1) for x in (q, k))
        find = compiled_finder() if q.is_cuda else tiles_with_weight
        # wider products take more shared memory than a GPU has
        by_scores = self.bias.lossless.by_scores and q.dtype.itemsize == 2
        counts = rows_from(find(q, k, slopes, window, starts, by_scores), first)
        return block_mask(counts, window=window, starts=starts), counts.density


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (0, 0, before, after)) if before or after else x


def penalty(slope_of: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor] | None:
    """Return the score function of a bias: score, batch, head, query, key -> score; None for the score itself.

    Args:
        slope_of: Slopes by this rank's number of a head.
    """
    if slope_of is None:
        return None

    def penalized(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slope_of(head) * (query - key)

    return penalized


@lru_cache(maxsize=4)
def flex_kernel(compiled: bool, one_shape: bool) -> Any:
    """Return FlexAttention, whose output is [queries, batch, local_heads, head_dim], as the layers take it.

    torch copies a gradient that does not lie as it expects one of the output to lie: in memory's order. Compiled, it
    fails where torch cannot compile it, instead of computing all scores.

    Args:
        compiled: Whether to compile it.
        one_shape: Whether to compile it for each shape, instead of once for all.
    """
    from torch.nn.attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Any:
        return flex_attention.flex_attention(q, k, v, **how).permute(2, 0, 1, 3)

    if not compiled:
        return attend
    # torch compiles a function for 8 kinds of arguments, and all models of a process share this one: allow as many as
    # torch ever does.
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit
    kernel = torch.compile(attend, fullgraph=True, dynamic=False if one_shape else None)
    return kernel if one_shape else _of_any_length(kernel)


def _of_any_length(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that is compiled for any batch and length at once; torch would learn that from a second one.

    A batch of 1 is compiled for itself: torch takes no size of 1 as one of many. So is each shape of documents, whose
    beginnings the mask's function holds.
    """
    lengths = r"L\['how'\]\['block_mask'\]\.seq_lengths.*"  # which are numbers, that cannot be marked

    def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Any:
        for x in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(x, [0, 2])
        for x in vars(how["block_mask"]).values():
            if isinstance(x, Tensor):  # [batch, heads, tiles] or [batch, heads, tiles, tiles]
                torch._dynamo.maybe_mark_dynamic(x, [0, *range(2, x.ndim)])
        with torch.compiler.config.patch(dynamic_sources=lengths):  # type: ignore[attr-defined]
            return kernel(q, k, v, **how)

    return attend
