"""Tiles of scores that FlexAttention computes: the causal ones, those within a sliding window, those with weight.

A tile is TILE queries by TILE keys. A row of tiles takes its own one, on the diagonal, and some of those before it, the
nearest first. A tile's number then follows from its place in the row, and only how many a row takes is data: the
numbers are made once for a length, and no number ever leaves the device.
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.backends import BACKENDS
from parallel.compiled import CompilerFailure, compiling
from parallel.documents import Documents
from training.model.kernels.tile_search import first_tiles_with_weight
from training.model.windows import norms, reach

logger = logging.getLogger(__name__)

TILE = BACKENDS["flex"].tile
NEAREST = 8  # keys whose weights bound a query's sum of weights; on trained weights, more gain little


class TileCounts(NamedTuple):
    """How many tiles are computed, [batch, local_heads, tiles] int32 each, by row of queries and by column of keys.

    Attributes:
        cut, whole: Tiles of a row that the mask cuts, and that it leaves whole.
        column_cut, column_whole: The same of a column, for the backward pass.
        density: Share of the causal tiles, mean over batch and heads, a scalar in fp32.
    """

    cut: Tensor
    whole: Tensor
    column_cut: Tensor
    column_whole: Tensor
    density: Tensor


@lru_cache(maxsize=16)
def mask_of_all(
    batch: int, heads: int, tiles: int, *, window: int | None, device: torch.device, first: int = 0
) -> tuple[Any, Tensor]:
    """Return the block mask of the tiles that the causal mask and a sliding window leave, and their density.

    Args:
        batch: Sequences.
        heads: Heads of this rank.
        tiles: Length of the sequence in tiles.
        window: Keys that a query sees, its own included; None for all before it.
        device: Where they are needed.
        first: See `rows_from`.
    """
    rows = torch.arange(tiles, dtype=torch.int32, device=device)
    counts = rows_from(_count(rows.expand(batch, heads, -1), window=window), first)
    return block_mask(counts, window=window), counts.density


@lru_cache(maxsize=4)
def mask_of_documents(documents: Documents, tiles: int, *, heads: int, window: int | None) -> tuple[Any, Tensor]:
    """Return the block mask of the tiles that documents and a sliding window leave, and their density.

    All layers of a micro-batch share it.

    Args:
        documents: The documents.
        tiles: Length of the sequence in tiles.
        heads: Heads of this rank.
        window: Keys that a query sees, its own included; None for all before it.
    """
    starts = starts_in_tiles(documents, tiles)
    counts = tiles_of_documents(starts, heads=heads, window=window)
    return block_mask(counts, window=window, starts=starts), counts.density


@lru_cache(maxsize=4)
def starts_in_tiles(documents: Documents, tiles: int) -> Tensor:
    """Return the place of the first token of each token's document, [batch, tiles * TILE].

    The tokens that fill up the last tile are a document of their own.

    Args:
        documents: The documents.
        tiles: Length of the sequence in tiles.
    """
    tokens = documents.starts.shape[1]
    return F.pad(documents.starts, (0, tiles * TILE - tokens), value=tokens)


def tiles_of_documents(starts: Tensor, *, heads: int, window: int | None) -> TileCounts:
    """Return the tiles that documents and a sliding window leave; nothing waits for the device.

    Args:
        starts: Place of the first token of each token's document, [batch, tiles * TILE].
        heads: Heads of this rank.
        window: Keys that a query sees, its own included; None for all before it.
    """
    first = _first_tiles(starts)
    behind = torch.arange(first.shape[2], device=starts.device) - first
    return _count(behind.int().expand(-1, heads, -1), window=window, documents=True)


def _first_tiles(starts: Tensor) -> Tensor:
    """Return the first tile that each row of tiles needs for its documents, [batch, 1, tiles]."""
    return starts[:, None, ::TILE] // TILE  # the first query of a row has the earliest document


def tiles_with_weight(
    q: Tensor,
    k: Tensor,
    slopes: Tensor,
    window: int | None,
    starts: Tensor | None = None,
    by_scores: bool = False,
) -> TileCounts:
    """Return the tiles in which keys have weight; nothing waits for the device.

    Args:
        q: By tile, [batch, local_heads, tiles, TILE, head_dim], zero where there is no query.
        k: Like q.
        slopes: [local_heads], on the same device.
        window: Keys that a query sees, its own included; None for all before it.
        starts: Place of the first token of each token's document, [batch, tiles * TILE]; None for one document.
        by_scores: Whether to look at scores, instead of norms alone.
    """
    tiles = q.shape[2]
    # the largest norm of a key in the tiles before each, [batch, local_heads, tiles]
    radius = F.pad(norms(k).amax(3).cummax(2).values[:, :, :-1], (1, 0))
    q, k = q.flatten(2, 3), k.flatten(2, 3)  # [batch, local_heads, tiles * TILE, head_dim]
    if by_scores:
        first = first_tiles_with_weight(q, k, radius, slopes, window, starts, TILE)
    else:
        first = _first_in_reach(q, k, radius, slopes, window=window, starts=starts)
    rows = torch.arange(tiles, device=q.device)
    # No row begins before the one above it, so that the rows that need a column follow each other: see `_count`.
    first = torch.minimum(first, rows).flip(2).cummin(2).values.flip(2)
    return _count((rows - first).int(), window=window, documents=starts is not None)


def _first_in_reach(
    q: Tensor, k: Tensor, radius: Tensor, slopes: Tensor, *, window: int | None, starts: Tensor | None
) -> Tensor:
    """Return the first tile that `windows.reach` leaves to each row; arguments as in `first_tiles_with_weight`."""
    sums = nearest_sums(q, k, slopes, nearest=NEAREST if window is None else min(NEAREST, window), starts=starts)
    radius = radius[..., None].expand(-1, -1, -1, TILE).flatten(2)
    keys_before = torch.arange(q.shape[2], device=q.device)
    first_keys = keys_before - reach(q, radius=radius, sums=sums, slopes=slopes)
    # nan is a query or key of nan or inf: take all
    first = first_keys.view(*radius.shape[:2], -1, TILE).amin(3).nan_to_num(nan=0.0).clamp(min=0.0) // TILE
    return first if starts is None else torch.maximum(first, _first_tiles(starts))


class TileFinder:
    """Compiles `tiles_with_weight` to a few kernels, once for all lengths; if that fails, runs uncompiled, by norms."""

    def __init__(self) -> None:
        self._compiled = torch.compile(tiles_with_weight, fullgraph=True)
        self._fails = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        slopes: Tensor,
        window: int | None,
        starts: Tensor | None = None,
        by_scores: bool = False,
    ) -> TileCounts:
        """Return the tiles, as `tiles_with_weight` does."""
        for x in (q, k):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        if starts is not None:
            torch._dynamo.maybe_mark_dynamic(starts, 1)
        if not self._fails:
            try:
                with compiling():
                    counts: TileCounts = self._compiled(q, k, slopes, window, starts, by_scores)
            except CompilerFailure as failure:
                self._fails = True
                logger.warning("lossless windows are found by slower functions: torch's compiler fails (%s)", failure)
            else:
                return counts
        return tiles_with_weight(q, k, slopes, window, starts)


@cache
def compiled_finder() -> TileFinder:
    """Return the finder that all models of a process share."""
    return TileFinder()


def nearest_sums(q: Tensor, k: Tensor, slopes: Tensor, *, nearest: int, starts: Tensor | None = None) -> Tensor:
    """Return the logarithm of the sum of weights of each query's nearest keys, [batch, local_heads, queries].

    Args:
        q: [batch, local_heads, queries, head_dim].
        k: Like q.
        slopes: [local_heads].
        nearest: How many keys, the query's own included.
        starts: Place of the first token of each token's document, [batch, queries]; None for one document.
    """
    length = k.shape[2]
    scaled = q.to(torch.promote_types(torch.float32, q.dtype)) / q.shape[3] ** 0.5
    k = F.pad(k, (0, 0, nearest - 1, 0))
    place = torch.arange(length, device=q.device)
    if starts is not None:
        place = (place - starts)[:, None]  # [batch, 1, queries]: within the document
    weights = []
    # One product of neighbours a distance: compiled, all are one pass over queries and keys.
    for distance in range(nearest):
        start = nearest - 1 - distance
        score = (scaled * k[:, :, start : start + length]).sum(3) - slopes[:, None] * distance
        weights.append(score.masked_fill(place < distance, -torch.inf))
    total: Tensor = reduce(torch.logaddexp, weights)
    return total


def _count(behind: Tensor, *, window: int | None, documents: bool = False) -> TileCounts:
    """Count the tiles of rows and columns.

    Args:
        behind: Tiles before its own that a row needs, [batch, local_heads, tiles]. The first of them never lies before
            that of the row above.
        window: Keys that a query sees, its own included; None for all before it.
        documents: Whether any tile may be cut.
    """
    tiles = behind.shape[2]
    rows = torch.arange(tiles, dtype=torch.int32, device=behind.device)
    # A column is needed by the rows from its own on that begin at it or before it, less those above it.
    ahead = ((rows - behind)[:, :, None, :] <= rows[:, None]).sum(3, dtype=torch.int32) - rows - 1
    uncut, edges = _within(window, tiles=tiles, documents=documents)
    cut, column_cut = (1 + (some - uncut).clamp(0, edges) for some in (behind, ahead))
    whole, column_whole = (some.clamp(max=uncut) for some in (behind, ahead))
    density = (cut + whole).sum(2, dtype=torch.float32).mean() / (tiles * (tiles + 1) // 2)
    return TileCounts(cut, whole, column_cut, column_whole, density)


def rows_from(counts: TileCounts, first: int) -> TileCounts:
    """Return counts of which the rows before one take their own tile alone: they have no queries.

    For the forward pass: columns are as before.

    Args:
        counts: The counts of all rows.
        first: The first row that has queries.
    """
    if first == 0:
        return counts
    tiles = counts.cut.shape[2]
    is_before = torch.arange(tiles, device=counts.cut.device) < first
    cut, whole = counts.cut.masked_fill(is_before, 1), counts.whole.masked_fill(is_before, 0)
    causal = (tiles - first) * (tiles + first + 1) // 2
    density = (cut + whole)[:, :, first:].sum(2, dtype=torch.float32).mean() / causal
    return counts._replace(cut=cut, whole=whole, density=density)


def _within(window: int | None, *, tiles: int, documents: bool) -> tuple[int, int]:
    """Return how many tiles before its own a sliding window leaves whole in a row, and how many it cuts after them.

    Where documents may cut any tile, all count as cut.
    """
    within, whole = (tiles, tiles) if window is None else ((window + TILE - 2) // TILE, max(0, window // TILE - 1))
    return (0, within) if documents else (whole, within - whole)


def block_mask(counts: TileCounts, *, window: int | None, starts: Tensor | None = None) -> Any:
    """Return FlexAttention's BlockMask of some tiles.

    Args:
        counts: How many.
        window: Keys that a query sees, its own included; None for all before it.
        starts: Place of the first token of each token's document, [batch, tiles * TILE]; None for one document.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads, tiles = counts.cut.shape
    cut, whole, column_cut, column_whole = (
        numbers.expand(batch, heads, -1, -1)
        for numbers in tile_numbers(tiles, window=window, documents=starts is not None, device=counts.cut.device)
    )
    # Passed in one by one: `from_kv_blocks` would sort the columns at each call.
    return BlockMask(
        seq_lengths=(tiles * TILE, tiles * TILE),
        kv_num_blocks=counts.cut,
        kv_indices=cut,
        full_kv_num_blocks=counts.whole,
        full_kv_indices=whole,
        q_num_blocks=counts.column_cut,
        q_indices=column_cut,
        full_q_num_blocks=counts.column_whole,
        full_q_indices=column_whole,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=visible(window) if starts is None else visible_inside(starts, window),  # for tiles that are cut
    )


@lru_cache(maxsize=16)
def tile_numbers(
    tiles: int, *, window: int | None, device: torch.device, documents: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the numbers of the tiles of each row that are cut and whole, and those of each column.

    Args:
        tiles: Length of the sequence in tiles.
        window: Keys that a query sees, its own included; None for all before it.
        device: Where they are needed.
        documents: Whether any tile may be cut.
    Returns:
        [tiles, tiles] int32 each, the nearest first. What lies beyond the counts is not read, but is a tile's number.
    """
    own = torch.arange(tiles, dtype=torch.int32, device=device)[:, None]
    place = own[:, 0]
    whole = place + 1  # distance in tiles of the first, second, ...
    cut = torch.where(place == 0, 0, place + _within(window, tiles=tiles, documents=documents)[0])
    signed = [sign * distance for sign in (-1, 1) for distance in (cut, whole)]
    row_cut, row_whole, column_cut, column_whole = ((own + distance).clamp(0, tiles - 1) for distance in signed)
    return row_cut, row_whole, column_cut, column_whole


@lru_cache(maxsize=16)
def visible(window: int | None) -> Callable[..., Tensor]:
    """Return the mask function: batch, head, query, key -> whether the query sees the key.

    Args:
        window: Keys that a query sees, its own included; None for all before it.
    """
    if window is None:
        return _seen

    def seen_within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _seen(batch, head, query, key) & (query - key < window)

    return seen_within


def visible_inside(starts: Tensor, window: int | None) -> Callable[..., Tensor]:
    """Return the mask function of documents.

    Args:
        starts: Place of the first token of each token's document, [batch, queries].
        window: Keys that a query sees, its own included; None for all before it.
    """
    seen = visible(window)

    def seen_inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen(batch, head, query, key) & (key >= starts[batch, query])

    return seen_inside


def _seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
