"""The text that a checkpoint is evaluated on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from data_pipeline.manifest import Prepared, load_prepared
from data_pipeline.text import TokenStream, file_stream, held_out_stream, unigram_perplexity
from training.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class EvaluationText:
    """A text as the model sees it.

    Attributes:
        name: Where it comes from.
        tokens: [tokens], int64.
        words: Words, separated by white space; None where only tokens are known.
        unigram_perplexity: Per-token perplexity of a model that knows only how frequent each token was in training;
            None where the training data is not at hand.
    """

    name: str
    tokens: npt.NDArray[np.int64]
    words: int | None
    unigram_perplexity: float | None


def held_out_text(checkpoint: Checkpoint) -> EvaluationText:
    """Return the part of the run's data that training held out.

    Raises:
        InputError: the data is not there, is other data than the run's, or nothing of it is held out.
    """
    prepared = _prepared(checkpoint)
    return _text(held_out_stream(prepared, split=checkpoint.config.data.split), prepared)


def file_text(checkpoint: Checkpoint, path: Path) -> EvaluationText:
    """Return a file's text, verbatim, nothing added.

    Raises:
        InputError: the file cannot be read as text.
    """
    stream = file_stream(path, checkpoint.tokenizer)
    try:
        prepared = _prepared(checkpoint)
    except InputError:
        # a checkpoint that was moved to another machine: the text is measured, the baseline is left out
        return _text(stream, None)
    return _text(stream, prepared)


def _text(stream: TokenStream, prepared: Prepared | None) -> EvaluationText:
    predicted = stream.tokens[1:]
    baseline = unigram_perplexity(prepared, predicted) if prepared is not None and len(predicted) else None
    return EvaluationText(stream.name, stream.tokens, stream.words, baseline)


def _prepared(checkpoint: Checkpoint) -> Prepared:
    data = checkpoint.config.data
    # not run.dir of the configuration: the run folder may have been moved
    folder = Path(data.dir) if data.dir else checkpoint.run_dir / "data"
    prepared = load_prepared(data, folder=folder)
    if hashlib.sha256(checkpoint.tokenizer.read_bytes()).hexdigest() != prepared.tokenizer_sha256:
        raise InputError(
            f"data in {folder} was prepared anew with another tokenizer than that of {checkpoint.path}: "
            "its tokens mean other text; give a text with --data"
        )
    return prepared
