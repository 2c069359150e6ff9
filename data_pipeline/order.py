"""The order of samples: position in an endless stream -> sample id, the same for any number of ranks."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.split import shuffled

_EPOCHS, _PLACES, _SOURCES = 1, 2, 3  # purposes of the numbers drawn from one seed


class SampleOrder:
    """The endless stream of sample ids; what it remembers is only a cache of the permutations in use.

    Without weights an epoch is a permutation of all ids. With weights each source has a fixed share of every
    epoch's positions and walks through its own endless stream of permutations: it is used up before it repeats.
    An id is the place of a sample in its source plus the sizes of the sources before it.
    """

    def __init__(self, *, seed: int, sizes: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
        assert sum(sizes) > 0, "an order needs samples"
        self.seed = seed
        self.sizes = sizes
        self.epoch_size = sum(sizes)
        self.shares = None if weights is None else shares(weights, total=self.epoch_size)
        self._offsets = np.cumsum((0, *sizes))
        # a global batch touches two epochs at most, of each source
        self._shuffled = lru_cache(maxsize=2 * (len(sizes) + 1))(shuffled)
        self._epoch_ids = lru_cache(maxsize=2)(self._ids_of_epoch)

    def ids(self, *, start: int, count: int) -> NDArray[np.int64]:
        """Return the ids at positions [start, start + count) of the stream, [count]."""
        first, last = start // self.epoch_size, (start + max(count, 1) - 1) // self.epoch_size
        cuts = []
        for epoch in range(first, last + 1):
            begin = epoch * self.epoch_size
            cuts.append(self._epoch_ids(epoch)[max(start - begin, 0) : max(start + count - begin, 0)])
        return np.concatenate(cuts)

    def _ids_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if self.shares is None:
            return shuffled(self.epoch_size, seed=(self.seed, _EPOCHS, epoch))
        places = shuffled(self.epoch_size, seed=(self.seed, _PLACES, epoch))
        source_at = np.repeat(np.arange(len(self.shares)), self.shares)[places]
        ids = np.empty(self.epoch_size, np.int64)
        for source, share in enumerate(self.shares):
            # in the order of its own stream: a source does not repeat a sample before it is used up
            ids[source_at == source] = self._uses(source, epoch, share)
        return ids

    def _uses(self, source: int, epoch: int, share: int) -> NDArray[np.int64]:
        """Return the ids of a source's uses [epoch * share, (epoch + 1) * share), counted over all epochs."""
        uses = np.arange(epoch * share, (epoch + 1) * share)
        size = self.sizes[source]
        rounds = range(epoch * share // size, (int(uses[-1]) // size + 1) if share else 0)
        parts = [self._shuffled(size, seed=(self.seed, _SOURCES, source, turn)) for turn in rounds]
        begin = epoch * share - (rounds.start * size)
        local = np.concatenate(parts)[begin : begin + share] if parts else uses
        ids: NDArray[np.int64] = local + self._offsets[source]
        return ids


def shares(weights: tuple[float, ...], *, total: int) -> tuple[int, ...]:
    """Return how many of `total` positions each weight gets, by largest remainder; ties go to the first.

    Args:
        weights: Positive, of any sum.
        total: Positions of an epoch.
    """
    exact = [weight / sum(weights) * total for weight in weights]
    given = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda source: given[source] - exact[source])
    for source in by_remainder[: total - sum(given)]:
        given[source] += 1
    return tuple(given)
