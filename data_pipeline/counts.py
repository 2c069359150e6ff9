"""How many samples prepared data makes: arithmetic on its index, for the launcher too. Imports no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.indexed import read_index
from data_pipeline.manifest import Part, Prepared, load_prepared
from data_pipeline.order import shares
from data_pipeline.split import held_out_sequences, training_sequences


def load_trainable(data: Data, *, folder: Path, validates: bool) -> Prepared:
    """Return prepared data that is long enough to train on, and to validate on where the run does.

    Args:
        data: The run's section; must ask for what was prepared.
        folder: RUN_DIR/data or data.dir.
        validates: Whether held-out samples are needed.
    Raises:
        InputError: see `load_prepared` and `sample_counts`.
    """
    prepared = load_prepared(data, folder=folder)
    for held_out in (False, True) if validates else (False,):
        sample_counts(prepared, sequence_length=data.sequence_length, split=data.split, held_out=held_out)
    return prepared


def sample_counts(prepared: Prepared, *, sequence_length: int, split: float, held_out: bool) -> tuple[int, ...]:
    """Return how many samples each part makes in one epoch, [parts]; 0 where it is shorter than one.

    Neighbouring samples share a token, so that n samples need n x sequence_length + 1 tokens.

    Args:
        prepared: Prepared data.
        sequence_length: Tokens of a sample's input.
        split: Share of the sequences held out.
        held_out: Whether the held-out samples are meant, or those of the training text.
    Raises:
        InputError: the text is shorter than one sample, or a source's weight is too small for one.
    """
    tokens = [_tokens(prepared, part, split=split, held_out=held_out) for part in prepared.parts]
    counts = tuple(max(0, found - 1) // sequence_length for found in tokens)
    for part, found, count in zip(prepared.parts, tokens, counts, strict=True):
        # without weights a short source is like the rest at the end of a longer text
        if not count and (prepared.weights is not None or len(prepared.parts) == 1):
            raise _too_short(part.name, found, sequence_length, held_out)
    if not any(counts):
        raise _too_short("every data source", max(tokens), sequence_length, held_out)
    if prepared.weights is not None:
        _check_shares(prepared, sum(counts))
    return counts


def chosen_sequences(part: Part, *, split: float, held_out: bool) -> NDArray[np.int64]:
    """Return the held-out sequences of a part, or the others, in ascending order."""
    chosen = held_out_sequences if held_out else training_sequences
    return chosen(part.sequences, share=split)


def _tokens(prepared: Prepared, part: Part, *, split: float, held_out: bool) -> int:
    indices = chosen_sequences(part, split=split, held_out=held_out)
    return int(read_index(prepared.prefix(part)).lengths[indices].sum(dtype=np.int64))


def _too_short(name: str, tokens: int, sequence_length: int, held_out: bool) -> InputError:
    kind = "held-out" if held_out else "training"
    more = "add text, raise data.split" if held_out else "add text"
    most = "at most " if name == "every data source" else ""
    return InputError(
        f"{name} has {most}{tokens} {kind} tokens and one sample needs {sequence_length + 1}: "
        f"{more} or lower data.sequence_length"
    )


def _check_shares(prepared: Prepared, total: int) -> None:
    weights = prepared.weights or ()
    for part, share in zip(prepared.parts, shares(weights, total=total), strict=True):
        if not share:
            raise InputError(
                f"data source {part.name} with weight {part.weight} gets none of {total} samples: raise its weight"
            )
