"""Blocks of queries, and the part of one strip of bias that each of them needs."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BiasBlock:
    """One block of queries.

    Attributes:
        queries: Its queries, by their numbers among all queries.
        first: Number of the first key that `near` covers; the keys before it are far.
        seen: Keys up to its last query.
        near: Bias of the keys from `first` to `seen`, [1, local_heads or 1, queries, seen - first].
    """

    queries: slice
    first: int
    seen: int
    near: Tensor


def bias_blocks(strip: Tensor, *, queries: int, keys: int, at_once: int) -> Iterator[BiasBlock]:
    """Yield blocks of queries.

    Args:
        strip: Bias of a sequence's last queries on its last keys, [1, local_heads or 1, rows, width]. If it covers all
            keys, none is far.
        queries: How many of the last positions.
        keys: Length of the sequence.
        at_once: Queries of a block, at most `rows`.
    """
    rows, width = strip.shape[2:]
    for start in range(0, queries, at_once):
        count = min(at_once, queries - start)
        seen = keys - queries + start + count
        first = max(0, seen - width)
        # The bias depends on distance alone: any block takes the strip's last rows and last columns.
        near = strip[:, :, rows - count :, width - (seen - first) :]
        yield BiasBlock(slice(start, start + count), first, seen, near)
