"""Triton kernels of `next_token`: programs that take a part of a head's keys each, and one that joins the parts."""

import triton
import triton.language as tl

from training.model.kernels.reach_triton import keys_in_reach


@triton.jit
def attend_part(
    q, keys, values, position, radius, series, parts, sums,
    q_batch, q_head, k_batch, k_head, k_place, v_batch, v_head, v_place, heads, window, scale, limit,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Store the mean of a part's values and the logarithm of its sum of weights; `next_token.Parts` launches it."""
    part, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, count = pair // heads, pair % heads, tl.num_programs(0)
    dims = tl.arange(0, WIDTH)
    inside = dims < HEAD_DIM
    own = tl.load(q + batch * q_batch + head * q_head + dims, mask=inside, other=0.0).to(tl.float32)
    keys += batch * k_batch + head * k_head + dims[None, :]
    values += batch * v_batch + head * v_head + dims[None, :]
    slope, last = tl.load(series + head), tl.load(position)

    behind = tl.minimum(last, window - 1).to(tl.int32)  # keys before its own that the query needs
    if radius is not None:
        endless = tl.load(series + heads + head)
        behind, norm = _keys_behind(
            own, keys + last * k_place, behind, tl.load(radius + pair),
            slope, endless, inside, k_place, scale, limit, NEAREST,
        )  # fmt: skip
        if part == 0:  # the other parts may read it before or after, and find the same
            tl.store(radius + pair, norm)

    each = tl.cdiv(tl.cdiv(behind + 1, TILE), count) * TILE
    first = last - behind + part * each
    end = tl.minimum(first + each, last + 1)
    highest, total = -float("inf"), 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    for start in range(0, (end - first).to(tl.int32), TILE):
        places = first + start + tl.arange(0, TILE)
        read = (places < end)[:, None] & inside[None, :]
        theirs = tl.load(keys + places[:, None] * k_place, mask=read, other=0.0).to(tl.float32)
        score = tl.sum(theirs * own[None, :], 1) * scale - slope * (last - places)
        score = tl.where(places < end, score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 0))
        weights, before = tl.exp(score - higher), tl.exp(highest - higher)
        theirs = tl.load(values + places[:, None] * v_place, mask=read, other=0.0).to(tl.float32)
        mean = mean * before + tl.sum(theirs * weights[:, None], 0)
        total = total * before + tl.sum(weights, 0)
        highest = higher
    place = pair * count + part
    if first < end:
        tl.store(parts + place * HEAD_DIM + dims, mean / total, mask=inside)
        tl.store(sums + place, highest + tl.log(total))
    else:
        tl.store(parts + place * HEAD_DIM + dims, mean, mask=inside)
        tl.store(sums + place, -float("inf"))


@triton.jit
def _keys_behind(own, newest, behind, norm, slope, endless, inside, k_place, scale, limit, NEAREST: tl.constexpr):
    """Return how many of the keys before a query's own have weight, at most `behind`, and the largest norm of a key.

    `newest` points to the own key, `norm` is the largest of the keys before it, or with it.
    """
    away = tl.arange(0, NEAREST)
    is_near = away <= behind
    near = tl.load(newest - away[:, None] * k_place, mask=is_near[:, None] & inside[None, :], other=0.0)
    near = near.to(tl.float32)
    score = tl.where(is_near, tl.sum(near * own[None, :], 1) * scale - slope * away, -float("inf"))
    highest = tl.max(score, 0)
    known = highest + tl.log(tl.sum(tl.exp(score - highest), 0))
    squares = tl.where(away == 0, tl.sum(near * near, 1), 0.0)
    # All parts of a head must find the same. A GPU's maximum leaves out nan unless it is told not to.
    norm = tl.maximum(norm, tl.sqrt(tl.sum(squares, 0)), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.sqrt(tl.sum(own * own, 0)) * norm * scale
    return keys_in_reach(largest, known, endless, limit, slope, behind), norm


@triton.jit
def join_parts(parts, sums, out, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Store a head's output, the mean of its parts by their sums of weights."""
    pair, dims, part = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, COUNT)
    inside = dims < HEAD_DIM
    known = tl.load(sums + pair * COUNT + part)
    weights = tl.exp(known - tl.max(known, 0))
    places = (pair * COUNT + part)[:, None] * HEAD_DIM + dims[None, :]
    means = tl.load(parts + places, mask=inside[None, :], other=0.0)
    joined = tl.sum(means * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + pair * HEAD_DIM + dims, joined.to(out.dtype.element_ty), mask=inside)
