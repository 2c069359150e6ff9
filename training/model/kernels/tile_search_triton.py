"""Triton kernels of `tile_search`: one program looks for one row of tiles of one head."""

import triton
import triton.language as tl

from training.model.kernels.reach_triton import keys_in_reach
from training.model.windows import RELATIVE_SLACK, SLACK

_RELATIVE_SLACK, _SLACK = tl.constexpr(RELATIVE_SLACK), tl.constexpr(SLACK)


@triton.jit
def search(
    q, k, radius, series, starts, first,
    q_batch, q_head, q_place, k_batch, k_head, k_place, heads, window, scale, limit,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Store the number of the first tile with weight; `first_tiles_with_weight` launches it, and says what is what.

    Places have 64 bits, as they are multiplied by strides.
    """
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head, tiles = pair // heads, pair % heads, tl.num_programs(0)
    lanes, dims = tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = dims < HEAD_DIM
    own = tl.load(q + batch * q_batch + head * q_head + (row * TILE + lanes) * q_place + dims, mask=inside, other=0.0)
    keys = k + batch * k_batch + head * k_head + lanes * k_place + dims
    slope, endless = tl.load(series + head), tl.load(series + heads + head)
    of_tile = tl.load(series + 2 * heads + head)
    places = row * TILE + tl.arange(0, TILE)
    behind = tl.minimum(places, window - 1).to(tl.int32)  # keys before its own that a query sees
    if starts is not None:
        behind = tl.minimum(behind, (places - tl.load(starts + batch * tiles * TILE + places)).to(tl.int32))

    sums = _sums_of_nearest(own, keys, row, inside, behind, slope, scale, k_place, TILE, NEAREST)
    wide = own.to(tl.float32)
    largest = tl.sqrt(tl.sum(wide * wide, 1)) * tl.load(radius + pair * tiles + row) * scale
    needed = keys_in_reach(largest, sums, endless, limit, slope, behind)
    tile = tl.min(places - needed, 0) // TILE

    known = of_tile - sums + largest * _RELATIVE_SLACK + _SLACK
    spent = tl.zeros([TILE], tl.float32)
    # Asked before a tile, not after it: for a B200, Triton cannot compile a sum over what the same turn multiplied.
    while _are_light(spent, limit, TILE) & (tile < row):
        theirs = tl.load(keys + tile * TILE * k_place, mask=inside, other=0.0)
        score = tl.max(tl.dot(own, tl.trans(theirs)), 1) * scale
        nearest = ((row - tile - 1) * TILE + 1).to(tl.int32) + tl.arange(0, TILE)
        # all of the weight is too much already: more would overflow
        spent += tl.exp(tl.minimum(score - slope * nearest + known, 0.0))
        tile += 1
    tile = tl.where(_are_light(spent, limit, TILE), tile, tile - 1)  # the last one that was looked at may have weight
    tl.store(first + pair * tiles + row, tile.to(tl.int32))


@triton.jit
def _are_light(spent, limit, TILE: tl.constexpr):
    """Return whether each query's keys so far weigh no more than the limit, whose logarithm is given."""
    return tl.sum((spent <= tl.exp(limit)).to(tl.int32), 0) == TILE  # nan is not


@triton.jit
def _sums_of_nearest(
    own, keys, row, inside, behind, slope, scale, k_place, TILE: tl.constexpr, NEAREST: tl.constexpr
):  # fmt: skip
    """Return the logarithm of each query's sum of weights in the nearest tiles, [TILE]."""
    highest, total = tl.full([TILE], -float("inf"), tl.float32), tl.zeros([TILE], tl.float32)
    lanes = tl.arange(0, TILE)
    for back in range(0, tl.minimum(row + 1, NEAREST).to(tl.int32)):
        theirs = tl.load(keys + (row - back) * TILE * k_place, mask=inside, other=0.0)
        distance = back * TILE + lanes[:, None] - lanes[None, :]
        score = tl.dot(own, tl.trans(theirs)) * scale - slope * distance
        score = tl.where((distance >= 0) & (distance <= behind[:, None]), score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        highest = higher
    return highest + tl.log(total)
