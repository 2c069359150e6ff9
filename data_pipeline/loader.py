"""Read a data rank's micro-batches of any step, given its first sample's place in the stream. Imports torch."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from configs.step_sizes import StepSize
from data_pipeline.order import SampleOrder
from data_pipeline.samples import Samples

_HASHED_IDS, _HASHED_SAMPLES = 1024, 16  # for order_hash: samples hashed by id, and samples hashed by tokens


class Loader:
    """Read micro-batches of training samples, chosen by (seed, place in the stream) alone: resuming needs one integer.

    Args:
        samples: Training samples.
        seed: The run's seed.
        micro_batch: Samples of one forward pass on one data rank.
        data_rank: This rank's place among the data ranks.
        data_size: Number of data ranks.
    """

    def __init__(self, samples: Samples, *, seed: int, micro_batch: int, data_rank: int, data_size: int) -> None:
        self._samples = samples
        self._order = SampleOrder(seed=seed, sizes=samples.sizes, weights=samples.weights)
        self._micro_batch = micro_batch
        self._data_rank = data_rank
        self._data_size = data_size

    def step(self, first_sample: int, size: StepSize) -> list[torch.Tensor]:
        """Return this rank's micro-batches of one step, each [micro_batch, seq + 1], int64; see `Samples.read`.

        Samples that are cut give [micro_batch x pieces, length + 1]: neighbouring pieces share a token, as samples do.

        Over all data ranks, micro-batch m holds the m-th group of micro_batch x data_size consecutive samples of the
        stream. So a step has the same samples, in the same order, for any number of ranks.

        Args:
            first_sample: Place of the step's first sample in the stream, from 0.
            size: Samples of the step over all data ranks, and the length of their pieces.
        """
        count = size.batch
        assert count % (self._micro_batch * self._data_size) == 0, "micro_batch x data ranks must divide a step"
        ids = self._order.ids(start=first_sample, count=count)
        # [count] -> [micro-batches, data ranks, micro_batch] -> [micro-batches, micro_batch]
        by_rank = ids.reshape(-1, self._data_size, self._micro_batch)[:, self._data_rank]
        return [_pieces(torch.from_numpy(self._samples.read(batch)), length=size.length) for batch in by_rank]

    def first_samples(self, count: int) -> list[torch.Tensor]:
        """Return the stream's first samples, the same on every data rank, each [1, seq + 1], int64."""
        return [torch.from_numpy(self._samples.read([sample])) for sample in self._order.ids(start=0, count=count)]

    def order_hash(self, first_sample: int) -> str:
        """Return a hash of the ids of the samples from one on, and of the tokens of the first few."""
        ids = self._order.ids(start=first_sample, count=_HASHED_IDS)
        digest = hashlib.sha256(repr((self._samples.sizes, self._samples.sequence_length)).encode())
        # little-endian everywhere, so that the hash does not depend on the machine
        digest.update(ids.astype("<i8").tobytes())
        digest.update(self._samples.read(ids[:_HASHED_SAMPLES]).astype("<i8").tobytes())
        return digest.hexdigest()


def _pieces(batch: torch.Tensor, *, length: int) -> torch.Tensor:
    """Cut samples [count, ..., seq + 1] into pieces, [count x pieces, ..., length + 1]."""
    pieces = batch.unfold(-1, length + 1, length).movedim(-2, 1).flatten(0, 1)
    return pieces.contiguous()  # those of one sample overlap in memory, from which a GPU does not copy on its own


def held_out_parts(
    samples: Samples, ids: NDArray[np.int64], *, length: int, micro_batch: int, data_rank: int, data_size: int
) -> Iterator[tuple[list[torch.Tensor], int]]:
    """Yield held-out samples, cut into pieces, in parts: this rank's micro-batches, and the pieces that all ranks have.

    The micro-batches of a part have one shape on all ranks, [up to micro_batch, length + 1] int64. So the mean loss
    over all samples is the mean over the parts, weighted by their pieces.

    Args:
        samples: Held-out samples.
        ids: Which of them, over all ranks.
        length: Tokens of a piece; a divisor of the samples'.
        micro_batch: Most pieces of one forward pass on one data rank.
        data_rank: This rank's place among the data ranks.
        data_size: Number of data ranks.
    """
    each = samples.sequence_length // length
    pieces = (ids[:, None] * each + np.arange(each)).reshape(-1)  # piece p is the (p % each)-th of sample p // each
    divided = len(pieces) - len(pieces) % data_size
    own, rest = pieces[:divided].reshape(-1, data_size)[:, data_rank], pieces[divided:]
    groups = [(own, data_size)]
    while rest.size:  # fewer pieces than ranks: as many ranks take each of a group, so that the ranks' mean is its mean
        group = max(size for size in range(1, len(rest) + 1) if data_size % size == 0)
        groups.append((rest[[data_rank % group]], group))
        rest = rest[group:]
    for taken, different in groups:
        full = len(taken) - len(taken) % micro_batch
        for batches in (taken[:full].reshape(-1, micro_batch), taken[None, full:]):
            if batches.size:
                yield [_read_pieces(samples, batch, length=length) for batch in batches], batches.size * different


def _read_pieces(samples: Samples, pieces: NDArray[np.int64], *, length: int) -> torch.Tensor:
    each = samples.sequence_length // length
    ids, places = np.unique(pieces // each, return_inverse=True)
    cut = _pieces(torch.from_numpy(samples.read(ids)), length=length)
    return cut[torch.from_numpy(places * each + pieces % each)]
