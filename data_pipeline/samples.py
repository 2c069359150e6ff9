"""Read samples of fixed length from prepared data, with megatron-core's GPTDataset. Imports torch."""

import errno
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, first_line
from configs.files import one_writer
from data_pipeline.counts import IndexKey, chosen_sequences, index_folder, sample_counts, unwritable_index
from data_pipeline.documents import document_begins
from data_pipeline.manifest import Prepared
from data_pipeline.manifest_file import Part
from data_pipeline.order import HELD_OUT_SEED, parts_of

with warnings.catch_warnings():
    # megatron-core warns that optional GPU libraries are missing; reading tokens needs none
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

logger = logging.getLogger(__name__)


class Samples:
    """One epoch of samples of `sequence_length` + 1 tokens, in which each token is a target at most once.

    Neighbouring samples share one token: the last target of one is the first input of the next.

    Args:
        datasets: The dataset of each part, None if the part is too short for a sample, [parts].
        sequence_length: Tokens of a sample's input.
        weights: Weight of each part, [parts]; None to sample in proportion to the text.
        end: The token that ends a document, if samples say where documents begin; else None.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset | None],
        *,
        sequence_length: int,
        weights: tuple[float, ...] | None,
        end: int | None = None,
    ) -> None:
        self._datasets, self._end = tuple(datasets), end
        self.sequence_length = sequence_length
        self.weights = weights
        self.sizes = tuple(0 if dataset is None else len(dataset) for dataset in self._datasets)
        """Samples of each part."""
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return samples, [len(ids), sequence_length + 1], int64: inputs are [:, :-1] and targets [:, 1:].

        If they say where documents begin, [len(ids), 2, sequence_length + 1]: a sample's tokens, and for each of them 1
        if it begins a document.

        Args:
            ids: Index of each sample in the epoch, in [0, len(self)).
        """
        # without documents there is one row: a view of two would not be copied to a GPU without waiting
        rows = np.empty((len(ids), 1 if self._end is None else 2, self.sequence_length + 1), np.int64)
        for row, sample, part in zip(rows, ids, parts_of(ids, self.sizes), strict=True):
            dataset = self._datasets[part]
            assert dataset is not None, f"there is no sample {sample}"
            number = int(sample) - int(self._ends[part]) + self.sizes[part]
            item = dataset[number]
            row[0, :-1], row[0, -1] = item["tokens"], item["labels"][-1]
            if self._end is not None:
                row[1] = document_begins(row[0], joins=_joins(dataset, number), end=self._end)
        return rows[:, 0] if self._end is None else rows


def open_samples(
    prepared: Prepared, *, sequence_length: int, split: float, seed: int, held_out: bool, documents: bool = False
) -> Samples:
    """Open the samples of the training or the held-out text.

    The index of samples is built once and kept beside the data. With several ranks, call this on rank 0, wait at
    a barrier, then call it on the other ranks: megatron-core builds an index on rank 0 only.

    Args:
        prepared: Prepared data.
        sequence_length: Tokens of a sample's input.
        split: Share of the sequences held out; give the same for training and held-out samples.
        seed: Seed of the order in which documents are joined into training samples; held-out samples ignore it.
        held_out: Open the held-out samples instead of the training samples.
        documents: Whether samples say where documents begin.
    Raises:
        InputError: see `sample_counts`; or the index is damaged, or is not where this rank looks for it.
    """
    counts = sample_counts(prepared, sequence_length=sequence_length, split=split, held_out=held_out)
    key = IndexKey(sequence_length, split, HELD_OUT_SEED if held_out else seed, held_out)
    datasets = [
        _open_part(prepared, part, key) if count else None for part, count in zip(prepared.parts, counts, strict=True)
    ]
    end = prepared.end_of_document if documents else None
    samples = Samples(datasets, sequence_length=sequence_length, weights=prepared.weights, end=end)
    assert samples.sizes == counts, f"megatron-core makes {samples.sizes} samples where {counts} were counted"
    return samples


def _joins(dataset: GPTDataset, number: int) -> NDArray[np.int64]:
    """Return the places in a sample, which was read before, at which another sequence of the data begins."""
    index = dataset.shuffle_index[number]
    (first, offset), (last, _) = dataset.sample_index[index], dataset.sample_index[index + 1]
    lengths = dataset.dataset.sequence_lengths[dataset.document_index[first:last]]
    joins: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64) - offset
    return joins


def _open_part(prepared: Prepared, part: Part, key: IndexKey) -> GPTDataset:
    """Open the dataset of a part's chosen sequences; build its index if it is not there yet.

    Raises:
        InputError: the index is damaged, or rank 0 has built it where this rank does not see it.
        MachineError: the index cannot be written.
    """
    sequence_length, split, seed, held_out = key
    sequences = chosen_sequences(part, split=split, held_out=held_out)
    cache = index_folder(prepared, part, key)
    dataset = IndexedDataset(str(prepared.prefix(part)), multimodal=False, mmap=True)

    def open_with(cache: Path) -> GPTDataset:
        config = _config(sequence_length, seed, prepared, cache)
        kind = Split.valid if held_out else Split.train
        # num_samples None is one epoch: with a number GPTDataset repeats tokens, and the order depends on the number
        return GPTDataset(dataset, part.name, sequences.astype(np.int32), None, kind, config)

    if not cache.is_dir():
        _build_index(open_with, cache)
    try:
        return open_with(cache)
    except (ValueError, EOFError) as error:  # from numpy, of a file that is cut short
        raise InputError(f"the index of samples {cache} is damaged ({first_line(error)}): delete that folder") from None


def _build_index(open_with: Callable[[Path], GPTDataset], cache: Path) -> None:
    """Build an index in a temporary folder and rename that, so that an interrupted build is never used."""
    ranks = torch.distributed
    if ranks.is_available() and ranks.is_initialized() and (rank := ranks.get_rank()):
        raise InputError(
            f"rank {rank} does not see the index of samples {cache}, which rank 0 has built: set data.dir to a folder "
            "that all nodes see, or start once on one node and copy the data again, with its index"
        )
    waiting = partial(logger.info, "waiting: another process is writing to %s", cache.parent.parent)
    try:
        with one_writer(cache.parent.parent, on_wait=waiting):  # two runs may share the data
            if cache.is_dir():
                return
            logger.info("building the index of samples, %s", cache)
            temporary = cache.with_name(f".{cache.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            open_with(temporary)  # GPTDataset writes the index where there is none
            temporary.replace(cache)
    except OSError as error:
        if error.errno == errno.ENOMEM:  # not the disk: the rank says what it held
            raise
        raise unwritable_index(cache, error.strerror or str(error)) from None


def _config(sequence_length: int, seed: int, prepared: Prepared, cache: Path) -> GPTDatasetConfig:
    # only what GPTDataset reads; without `pad`, so that no token of the text counts as padding
    tokenizer = SimpleNamespace(
        vocab_size=prepared.vocab_size,
        eod=prepared.end_of_document,
        unique_identifiers={"sha256": prepared.tokenizer_sha256},
    )
    return GPTDatasetConfig(
        # megatron-core draws with RandomState, which takes 32 bits
        random_seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
