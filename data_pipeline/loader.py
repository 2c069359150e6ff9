"""A data rank's micro-batches of any step, from the number of samples consumed before it. Imports torch."""

import hashlib
from collections.abc import Iterator

import torch

from data_pipeline.order import SampleOrder
from data_pipeline.samples import HELD_OUT_SEED, Samples

_HASHED_IDS, _HASHED_SAMPLES = 1024, 16


class Loader:
    """Micro-batches of training samples; which ones is a function of (seed, consumed samples) alone.

    Args:
        samples: Training samples.
        seed: The run's seed.
        global_batch: Samples of one step over all data ranks.
        micro_batch: Samples of one forward pass on one data rank.
        data_rank: This rank among the data ranks.
        data_size: Number of data ranks.
    """

    def __init__(
        self, samples: Samples, *, seed: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int
    ) -> None:
        assert global_batch % (micro_batch * data_size) == 0, "micro_batch x data ranks must divide the global batch"
        self._samples = samples
        self._order = SampleOrder(seed=seed, sizes=samples.sizes, weights=samples.weights)
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._data_rank = data_rank
        self._data_size = data_size

    def step(self, consumed_samples: int) -> list[torch.Tensor]:
        """Return this rank's micro-batches of one step, each [micro_batch, seq + 1], int64.

        Micro-batch m of all ranks together is the m-th run of micro_batch x data_size samples of the stream, so that
        the samples of a step are the same, in the same order, for any number of ranks.

        Args:
            consumed_samples: Samples of all steps before.
        """
        ids = self._order.ids(start=consumed_samples, count=self._global_batch)
        by_rank = ids.reshape(-1, self._data_size, self._micro_batch)[:, self._data_rank]
        return [torch.from_numpy(self._samples.read(batch)) for batch in by_rank]

    def first_samples(self, count: int) -> list[torch.Tensor]:
        """Return the stream's first samples, the same on every data rank, each [1, seq + 1], int64."""
        return [torch.from_numpy(self._samples.read([sample])) for sample in self._order.ids(start=0, count=count)]

    def order_hash(self, consumed_samples: int) -> str:
        """Return a hash of the samples that follow a position: which they are, and the tokens of the first."""
        ids = self._order.ids(start=consumed_samples, count=_HASHED_IDS)
        digest = hashlib.sha256(repr((self._samples.sizes, self._samples.sequence_length)).encode())
        digest.update(ids.astype("<i8").tobytes())
        digest.update(self._samples.read(ids[:_HASHED_SAMPLES]).astype("<i8").tobytes())
        return digest.hexdigest()


def held_out_batches(
    samples: Samples, *, count: int, micro_batch: int, data_rank: int, data_size: int
) -> Iterator[torch.Tensor]:
    """Yield this rank's micro-batches of the same held-out samples every time, each [micro_batch, seq + 1], int64.

    Args:
        samples: Held-out samples.
        count: Samples wanted over all ranks; rounded down to whole micro-batches of every rank, one at least, and
            repeated if there are fewer.
        micro_batch: Samples of one forward pass on one data rank.
        data_rank: This rank among the data ranks.
        data_size: Number of data ranks.
    """
    run = micro_batch * data_size
    order = SampleOrder(seed=HELD_OUT_SEED, sizes=samples.sizes, weights=samples.weights)
    ids = order.ids(start=0, count=max(count // run, 1) * run)
    for batch in ids.reshape(-1, data_size, micro_batch)[:, data_rank]:
        yield torch.from_numpy(samples.read(batch))
