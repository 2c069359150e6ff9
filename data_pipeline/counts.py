"""Count the samples of prepared data from its index. Imports no torch: the launcher checks data with it too."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, MachineError
from configs.schema import RunConfig
from data_pipeline.indexed import read_index
from data_pipeline.manifest import Prepared, load_prepared
from data_pipeline.manifest_file import Part
from data_pipeline.order import HELD_OUT_SEED, held_out_ids, parts_of, shares
from data_pipeline.split import held_out_sequences, training_sequences


class IndexKey(NamedTuple):
    """What decides the samples of prepared data, beside the data itself."""

    sequence_length: int
    split: float
    seed: int
    """Of the order in which sequences are joined; of held-out samples always HELD_OUT_SEED."""
    held_out: bool


def load_trainable(config: RunConfig, *, folder: Path) -> Prepared:
    """Load prepared data and check that it is long enough to train on, and to validate on.

    Args:
        config: The run, whose section `data` must match the prepared data.
        folder: RUN_DIR/data or data.dir.
    Raises:
        InputError: see `load_prepared` and `sample_counts`; or the run validates by source, and one gets no sample.
    """
    data = config.data
    prepared = load_prepared(data, folder=folder)
    # sample_counts raises if the text is too short
    sample_counts(prepared, sequence_length=data.sequence_length, split=data.split, held_out=False)
    if config.validation_lengths:
        longest = max(config.validation_lengths)
        key = "data.sequence_length" if longest == data.sequence_length else "evaluate.validation_lengths"
        counts = sample_counts(prepared, sequence_length=longest, split=data.split, held_out=True, key=key)
        if config.evaluate.by_source:
            _check_sources(config, prepared, counts)
    return prepared


def sample_counts(
    prepared: Prepared,
    *,
    sequence_length: int,
    split: float,
    held_out: bool,
    key: str = "data.sequence_length",
) -> tuple[int, ...]:
    """Return the number of samples of each part in one epoch, [parts]; 0 if a part is shorter than one sample.

    Neighbouring samples share a token: the last target of one is the first input of the next. So n samples need
    n x sequence_length + 1 tokens.

    Args:
        prepared: Prepared data.
        sequence_length: Tokens of a sample's input.
        split: Share of the sequences held out.
        held_out: Count the held-out samples instead of the training samples.
        key: The key that has the length, for the error.
    Raises:
        InputError: the text is shorter than one sample, or a source's weight is too small for one.
    """
    tokens = [_tokens(prepared, part, split=split, held_out=held_out) for part in prepared.parts]
    counts = tuple(max(0, available - 1) // sequence_length for available in tokens)
    for part, available, count in zip(prepared.parts, tokens, counts, strict=True):
        # without weights a short part is dropped, like the remainder at the end of a longer one
        if not count and (prepared.weights is not None or len(prepared.parts) == 1):
            raise _too_short(f"{part.name} has", available, sequence_length, held_out, key)
    if not any(counts):
        raise _too_short("every data source has at most", max(tokens), sequence_length, held_out, key)
    if prepared.weights is not None:
        _check_shares(prepared, sum(counts), sequence_length, held_out, key)
    return counts


def chosen_sequences(part: Part, *, split: float, held_out: bool) -> NDArray[np.int64]:
    """Return the held-out or the training sequences of a part, in ascending order."""
    choose = held_out_sequences if held_out else training_sequences
    return choose(part.sequences, share=split)


def held_out_tokens(prepared: Prepared) -> int:
    """Return the number of tokens of the held-out text, which `evaluate` measures by default."""
    return sum(_tokens(prepared, part, split=prepared.split, held_out=True) for part in prepared.parts)


def index_folder(prepared: Prepared, part: Part, key: IndexKey) -> Path:
    """Return the folder of the index of a part's samples."""
    # megatron-core names a cached index without regard to the chosen sequences, so each choice gets its own folder
    text = f"{prepared.fingerprint} {part.prefix} {part.bin_bytes} {tuple(key)}"
    name = hashlib.sha256(os.fsencode(text)).hexdigest()[:16]  # the path of a part may not be UTF-8
    return prepared.folder / "index" / f"{'held-out' if key.held_out else 'training'}-{key.sequence_length}-{name}"


def check_index(config: RunConfig, prepared: Prepared) -> None:
    """Check that a start finds the indices of its samples, or may write them.

    Raises:
        MachineError: it may not.
    """
    if os.access(prepared.folder, os.W_OK | os.X_OK):
        return
    split = prepared.split
    keys = [IndexKey(config.data.sequence_length, split, config.run.seed, held_out=False)]
    keys += [IndexKey(length, split, HELD_OUT_SEED, held_out=True) for length in config.validation_lengths[-1:]]
    for key in keys:
        counts = sample_counts(prepared, sequence_length=key.sequence_length, split=split, held_out=key.held_out)
        for part, count in zip(prepared.parts, counts, strict=True):
            if count and not (folder := index_folder(prepared, part, key)).is_dir():
                raise unwritable_index(folder, "Permission denied")


def unwritable_index(folder: Path, reason: str) -> MachineError:
    """Return the error of an index of samples that the first start would write beside the data, and cannot."""
    return MachineError(
        f"the index of samples {folder} cannot be written ({reason}): copy the data to a folder of yours and set "
        "data.dir to it, or let its owner start such a run once"
    )


def _tokens(prepared: Prepared, part: Part, *, split: float, held_out: bool) -> int:
    indices = chosen_sequences(part, split=split, held_out=held_out)
    return int(read_index(prepared.prefix(part)).lengths[indices].sum(dtype=np.int64))


def _too_short(subject: str, tokens: int, sequence_length: int, held_out: bool, key: str) -> InputError:
    kind = "held-out" if held_out else "training"
    advice = "add text, raise data.split" if held_out else "add text"
    return InputError(
        f"{subject} {tokens} {kind} tokens and one sample needs {sequence_length + 1}: {advice} or lower {key}"
    )


def _check_sources(config: RunConfig, prepared: Prepared, counts: tuple[int, ...]) -> None:
    ids = held_out_ids(counts, weights=prepared.weights, count=config.evaluate.samples)
    measured = {*parts_of(ids, counts).tolist()}
    if others := [source.path for number, source in enumerate(config.data.sources) if number not in measured]:
        raise InputError(
            f"evaluate.by_source is true, but none of the {len(ids)} sequences of a validation is of "
            f"{', '.join(others)}: raise evaluate.samples or the weight, or set evaluate.by_source to false"
        )


def _check_shares(prepared: Prepared, total: int, sequence_length: int, held_out: bool, key: str) -> None:
    weights = prepared.weights or ()
    for part, share in zip(prepared.parts, shares(weights, total=total), strict=True):
        if not share:
            kind, advice = ("held-out ", f", raise data.split or lower {key}") if held_out else ("", "")
            raise InputError(
                f"data source {part.name} with weight {part.weight} gets none of the {total} {kind}samples of "
                f"{sequence_length} tokens: raise its weight{advice}"
            )
