"""The order of samples: position in an endless stream -> sample id, the same for any number of ranks."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.split import shuffled

# purposes: each draws its own random numbers from one seed
_EPOCHS, _POSITIONS, _SOURCES = 1, 2, 3

HELD_OUT_SEED = 1  # validation is the same for every seed of the run


class SampleOrder:
    """An endless stream of sample ids, as a pure function: its only state is a cache of permutations.

    Without weights, an epoch is a permutation of all ids. With weights, each source has a fixed share of every epoch's
    positions and its own endless stream of permutations, so that it repeats no sample before all are used. An id is
    the index of a sample in its source plus the sizes of the sources before it.

    Args:
        seed: The run's seed.
        sizes: Samples of each source, [sources].
        weights: Weight of each source, [sources]; None to sample in proportion to the sizes.
    """

    def __init__(self, *, seed: int, sizes: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
        assert sum(sizes) > 0, "an order needs samples"
        self.seed = seed
        self.sizes = sizes
        self.epoch_size = sum(sizes)
        self.shares = None if weights is None else shares(weights, total=self.epoch_size)
        self._offsets = np.cumsum((0, *sizes))
        # a global batch rarely touches more than two epochs
        self._shuffled = lru_cache(maxsize=2 * (len(sizes) + 1))(shuffled)
        self._epoch_ids = lru_cache(maxsize=2)(self._ids_of_epoch)

    def ids(self, *, start: int, count: int) -> NDArray[np.int64]:
        """Return the ids at positions [start, start + count) of the stream, [count]."""
        # count 0 still needs one epoch, for an empty slice: np.concatenate refuses an empty list
        first, last = start // self.epoch_size, (start + max(count, 1) - 1) // self.epoch_size
        slices = []
        for epoch in range(first, last + 1):
            begin = epoch * self.epoch_size
            slices.append(self._epoch_ids(epoch)[max(start - begin, 0) : max(start + count - begin, 0)])
        return np.concatenate(slices)

    def distinct_ids(self, count: int) -> NDArray[np.int64]:
        """Return the first `count` ids of the stream without repeats, or all ids if there are fewer, [up to count]."""
        # With weights, an epoch repeats samples of a small source and leaves out some of the others: these come last.
        stream = np.concatenate([self._epoch_ids(0), np.arange(self.epoch_size)])
        _, first_places = np.unique(stream, return_index=True)
        return stream[np.sort(first_places)[:count]]

    def _ids_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if self.shares is None:
            return shuffled(self.epoch_size, seed=(self.seed, _EPOCHS, epoch))
        positions = shuffled(self.epoch_size, seed=(self.seed, _POSITIONS, epoch))
        # which source each position reads from: `share` positions of each, shuffled
        source_at = np.repeat(np.arange(len(self.shares)), self.shares)[positions]  # [epoch_size]
        ids = np.empty(self.epoch_size, np.int64)
        for source, share in enumerate(self.shares):
            ids[source_at == source] = self._source_ids(source, epoch, share)
        return ids

    def _source_ids(self, source: int, epoch: int, share: int) -> NDArray[np.int64]:
        """Return the ids that an epoch takes from a source: [epoch * share, (epoch + 1) * share) of its own stream."""
        if not share:
            return np.zeros(0, np.int64)
        size, start = self.sizes[source], epoch * share
        # the source's stream is one permutation after another; read those that hold the range
        first, last = start // size, (start + share - 1) // size
        permutations = [
            self._shuffled(size, seed=(self.seed, _SOURCES, source, number)) for number in range(first, last + 1)
        ]
        begin = start - first * size
        ids: NDArray[np.int64] = np.concatenate(permutations)[begin : begin + share] + self._offsets[source]
        return ids


def held_out_ids(sizes: tuple[int, ...], *, weights: tuple[float, ...] | None, count: int) -> NDArray[np.int64]:
    """Return the held-out samples of a validation, always the same, [count]; all of them if there are fewer.

    Args:
        sizes: Held-out samples of each source, [sources].
        weights: Weight of each source, [sources]; None to take samples in proportion to the sizes.
        count: How many to take.
    """
    # not simply the first samples: with weights, each source must have its share
    return SampleOrder(seed=HELD_OUT_SEED, sizes=sizes, weights=weights).distinct_ids(count)


def parts_of(ids: Sequence[int] | NDArray[np.int64], sizes: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the number of the source that each sample is from, [len(ids)], by the samples of each source."""
    return np.searchsorted(np.cumsum(sizes), ids, side="right")


def shares(weights: tuple[float, ...], *, total: int) -> tuple[int, ...]:
    """Return how many of `total` positions each weight gets, by largest remainder; ties go to the first.

    Args:
        weights: Positive, of any sum.
        total: Positions of an epoch.
    """
    # rounding down leaves fewer positions over than there are weights: the largest remainders get one each
    exact = [weight / sum(weights) * total for weight in weights]
    given = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda source: given[source] - exact[source])
    for source in by_remainder[: total - sum(given)]:
        given[source] += 1
    return tuple(given)
