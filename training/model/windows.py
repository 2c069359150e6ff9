"""Lossless windows: from which distance on ALiBi leaves the keys of a query no weight.

A key at distance D has the score q.k / sqrt(d) - slope * D, and |q.k| is at most |q| |k|. So all keys at distance D and
beyond together have at most this share of a query's attention, where `radius` is the largest norm of a key among them
and `sum` the logarithm of its sum of weights, or anything below it:

    exp(|q| radius / sqrt(d) - slope * D - sum) / (1 - exp(-slope))

Left out, keys of a share s change the output by at most 2 s max|v|. The limit of s below keeps that within half a unit
in the last place of max|v|, and the distance follows in closed form. Nothing here is learned, assumed or kept: each
call computes its windows from its own queries and keys. docs/decisions/0037 derives it and names its source; 0047 adds
the scores themselves, where that is cheap.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

# Norms, sums of weights and this bound are computed in fp32: their rounding, with room to spare.
RELATIVE_SLACK, SLACK = 1e-5, 0.01
_CALLS_KEPT = 4096
SEARCH_PART = 0.5  # of the limit, for keys that are left out by their scores; those out of reach have the rest
_MOST_STEPS = 8  # of keys whose scores are looked at together


class LosslessWindows:
    """Lets a kernel leave out keys without weight, and keeps what share of the scores its calls computed.

    Attributes:
        by_scores: Whether kernels of a GPU look at scores too, as that of a CPU does in training.
    """

    def __init__(self, *, by_scores: bool = False) -> None:
        self.by_scores = by_scores
        self._densities: deque[Tensor] = deque(maxlen=_CALLS_KEPT)

    def add(self, density: Tensor) -> None:
        """Note a call.

        Args:
            density: Share of the score blocks of causal attention that were computed, mean over heads; a scalar in
                fp32, on the device: nothing waits for it.
        """
        self._densities.append(density)

    @contextmanager
    def as_one(self, scores: Sequence[int], *, of: int) -> Iterator[None]:
        """Note several calls as one.

        Args:
            scores: Causal scores of each call.
            of: Causal scores that their sum is a share of.
        """
        before, self._densities = self._densities, deque()
        try:
            yield
        finally:
            calls, self._densities = self._densities, before
        if calls:
            shares = zip(calls, scores, strict=True)
            self.add(torch.stack([density * (count / of) for density, count in shares]).sum())

    def take(self) -> list[Tensor]:
        """Return the densities of the latest calls, in their order, and forget them: one per block and pass."""
        taken = list(self._densities)
        self._densities.clear()
        return taken


def share_limit(dtype: torch.dtype) -> float:
    """Return the share of a query's attention that may be left out, all keys together.

    Twice this share is a quarter of the type's machine epsilon: half a unit in the last place is never less.
    """
    return torch.finfo(dtype).eps / 8


def norms(x: Tensor) -> Tensor:
    """Return the norms of queries or keys, [..., head_dim] -> [...], in fp32 or wider."""
    wide: Tensor = x.norm(dim=-1, dtype=torch.promote_types(torch.float32, x.dtype))
    return wide


def reach(q: Tensor, *, radius: Tensor, sums: Tensor, slopes: Tensor, part: float = 1.0) -> Tensor:
    """Return the distance from which on all keys together have no weight; inf or nan if there is none.

    Args:
        q: [batch, local_heads, queries, head_dim].
        radius: Largest norm of a key that may be left out, [batch, local_heads, queries or 1].
        sums: Logarithm of each query's sum of weights, or less, [batch, local_heads, queries].
        slopes: [local_heads].
        part: What part of the limit these keys may weigh.
    Returns:
        [batch, local_heads, queries], in fp32 or wider.
    """
    slope = slopes.to(sums.device, sums.dtype)[:, None]
    score = norms(q) * radius * ((1 + RELATIVE_SLACK) / q.shape[-1] ** 0.5)  # a key's largest, but for its distance
    limit = math.log(part * share_limit(q.dtype))
    distance: Tensor = (score - sums - (-torch.expm1(-slope)).log() - limit + SLACK) / slope
    return distance


def first_keys_with_weight(
    q: Tensor,
    k: Tensor,
    *,
    firsts: Sequence[int],
    end: int,
    position: int,
    step: int,
    sums: Tensor,
    radius: Tensor,
    slopes: Tensor,
) -> list[int]:
    """Return the number of the first key that any of a block's queries needs, by head, from the scores themselves.

    `reach` bounds scores by norms, which lets in many keys that no query meets. Here the keys that it left are looked
    at from the furthest on, `step` at a time, until those so far weigh too much in one row.

    Args:
        q: [batch, local_heads, queries, head_dim].
        k: [batch, local_heads, keys, head_dim].
        firsts: Keys before these are out of `reach`, by head.
        end: Keys from here on are needed.
        position: Number of the first query among the keys, at least `end`.
        step: Keys that are computed or left out together.
        sums: Logarithm of each query's sum of weights, or less, [batch, local_heads, queries].
        radius: Largest norm of a key before `end`, [batch, local_heads, 1].
        slopes: [local_heads].
    Returns:
        By head what `firsts` has, or a whole number of steps more.
    """
    slope = slopes.to(sums.device, sums.dtype)[:, None]
    # places count from the first query: in fp32, a slope times a place in a long text would be rounded
    places = torch.arange(q.shape[2], device=q.device)
    # Keys of a step weigh at most as their largest score at the distances of all: the sum of a geometric series.
    several = (torch.expm1(-slope * step) / torch.expm1(-slope)).log()
    known = several - slope * places - sums + norms(q) * radius * (RELATIVE_SLACK / q.shape[-1] ** 0.5) + SLACK
    limit = math.log(SEARCH_PART * share_limit(q.dtype))
    search = partial(_first_with_weight, end=end, position=position, step=step, limit=limit)
    heads = enumerate(zip(firsts, slopes.tolist(), strict=True))
    return [search(q[:, head], k[:, head], known[:, head], first=first, slope=own) for head, (first, own) in heads]


def _first_with_weight(
    q: Tensor,
    k: Tensor,
    known: Tensor,
    *,
    first: int,
    end: int,
    position: int,
    step: int,
    slope: float,
    limit: float,
) -> int:
    """Return the first key that any query of a head needs; `known` is what its scores lack, [batch, queries]."""
    spent, count = torch.full_like(known, -math.inf), 1
    while (count := min(count, (end - first) // step)) > 0:
        stop = first + count * step
        products = q.to(known.dtype) @ k[:, first:stop].to(known.dtype).mT
        largest = products.view(*known.shape, count, step).amax(3) * q.shape[-1] ** -0.5
        nearest = torch.arange(first + step - 1 - position, stop - position, step, device=q.device)
        shares = (largest + slope * nearest + known[..., None]).logcumsumexp(2)
        shares = torch.logaddexp(spent[..., None], shares)
        light = [share <= limit for share in shares.amax((0, 1)).tolist()]  # nan is not
        if not all(light):
            return first + light.index(False) * step
        spent, first, count = shares[..., -1], stop, min(2 * count, _MOST_STEPS)
    return first


def first_keys(distances: Tensor, *, position: int, step: int) -> list[int]:
    """Return the number of the first key that any of a block's queries needs, by head, a multiple of `step`.

    Args:
        distances: From `reach`, [batch, local_heads, queries].
        position: Number of the first query among the keys.
        step: Keys that are computed or left out together.
    """
    places = torch.arange(position, position + distances.shape[2], device=distances.device)
    lowest = (places - distances).amin((0, 2)).nan_to_num(nan=0.0).clamp(min=0)
    return [int(first) // step * step for first in lowest.tolist()]


def runs_of_heads(firsts: Sequence[int], *, end: int) -> Iterator[tuple[slice, slice]]:
    """Yield neighbouring heads with the same keys before `end`, and these keys; heads without any are left out."""
    place = 0
    for first, group in groupby(min(first, end) for first in firsts):
        heads = slice(place, place + sum(1 for _ in group))
        place = heads.stop
        if first < end:
            yield heads, slice(first, end)
