"""Load the text that a checkpoint is evaluated on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from data_pipeline.documents import document_begins
from data_pipeline.manifest import Prepared
from data_pipeline.text import TokenStream, file_stream, held_out_stream, unigram_perplexity
from data_pipeline.tokenizer import load_tokenizer
from training.checkpoint.read import Checkpoint
from training.evaluation.precheck import run_data


@dataclass(frozen=True)
class EvaluationText:
    """A tokenized text.

    Attributes:
        name: Where it comes from, for the report.
        tokens: [tokens]; on disk, as a text may be larger than memory.
        words: Words, separated by white space; None if only the tokens are known.
        unigram_perplexity: Per-token perplexity of a unigram model, fitted to the training data; None if that data
            is not available.
        documents: First token of each document, [documents]; None if they are not known.
        begins: Whether each token begins a document that attention stays inside of, [tokens]; None if it sees all.
    """

    name: str
    tokens: npt.NDArray[np.integer]
    words: int | None
    unigram_perplexity: float | None
    documents: npt.NDArray[np.int64] | None = None
    begins: npt.NDArray[np.bool_] | None = None


def held_out_text(checkpoint: Checkpoint) -> EvaluationText:
    """Return the held-out split of the run's data.

    Raises:
        InputError: the data is missing, is not the run's, or has no held-out part.
    """
    prepared = run_data(checkpoint.path, config=checkpoint.config)
    return _text(held_out_stream(prepared, split=checkpoint.config.data.split), prepared, checkpoint)


def file_text(checkpoint: Checkpoint, path: Path) -> EvaluationText:
    """Return the text of a file, verbatim, with nothing added.

    Raises:
        InputError: the file cannot be read as text.
    """
    stream = file_stream(path, checkpoint.tokenizer)
    try:
        prepared = run_data(checkpoint.path, config=checkpoint.config)
    except InputError:
        # The checkpoint may have been moved to another machine: leave out the baseline, which needs the data.
        return _text(stream, None, checkpoint)
    return _text(stream, prepared, checkpoint)


def _text(stream: TokenStream, prepared: Prepared | None, checkpoint: Checkpoint) -> EvaluationText:
    predicted = stream.tokens[1:]
    baseline = unigram_perplexity(prepared, predicted) if prepared is not None and len(predicted) else None
    begins = None
    if checkpoint.config.data.mask_documents:
        end = load_tokenizer(checkpoint.tokenizer).end_of_document
        begins = document_begins(stream.tokens, joins=stream.joins, end=end)
    return EvaluationText(stream.name, stream.tokens, stream.words, baseline, stream.documents, begins)
