"""Read evaluation text as one stream of tokens, to be evaluated at any length."""

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.indexed import READ_AT_ONCE, document_numbers, iter_sequences, read_index
from data_pipeline.kinds import file_kind
from data_pipeline.manifest import UNIGRAM_NAME, Prepared
from data_pipeline.manifest_file import Part
from data_pipeline.prefixes import words_path
from data_pipeline.sources import file_chunks, source_files
from data_pipeline.split import held_out_sequences
from data_pipeline.storage import move_cuts
from data_pipeline.token_file import TokenFile
from data_pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a text in order."""

    name: str
    tokens: NDArray[np.integer]
    """[tokens]; on disk, as a text may be larger than memory."""
    words: int | None
    """White space separated words; None where only the tokens are known."""
    documents: NDArray[np.int64]
    """First token of each document, [documents]; neighbouring parts of one document are one."""
    joins: NDArray[np.int64]
    """First token of each piece that training joins to others, [pieces]: of a held-out text its sequences."""


@dataclass(frozen=True)
class TextIdentity:
    """The text that tokens stand for, whatever the tokenizer; control tokens count nothing.

    Attributes:
        sha256: Its hash.
        bytes: Its length in UTF-8.
    """

    sha256: str
    bytes: int


def held_out_stream(prepared: Prepared, *, split: float) -> TokenStream:
    """Return the held-out sequences of all parts, one after the other.

    Raises:
        InputError: nothing is held out.
    """
    if not split:
        raise InputError("data.split is 0, so no text is held out: give a text with --data, or set data.split")
    held_out = [(part, held_out_sequences(part.sequences, share=split)) for part in prepared.parts]
    with TokenFile(vocab_size=prepared.vocab_size) as file:
        ends = [0]
        for part, sequences in held_out:
            for block in iter_sequences(prepared.prefix(part), sequences=sequences):
                file.add(block)
            ends.append(file.count)
        tokens = file.read()
    words = [_words(prepared, part, sequences) for part, sequences in held_out]
    known = [count for count in words if count is not None]
    starts = [_starts(prepared, part, sequences) for part, sequences in held_out]
    documents, joins = (
        np.concatenate([each + end for each, end in zip(kind, ends[:-1], strict=True)])
        for kind in zip(*starts, strict=True)
    )
    return TokenStream("held-out", tokens, sum(known) if len(known) == len(words) else None, documents, joins)


def file_stream(path: Path, tokenizer_path: Path) -> TokenStream:
    """Return a file's text verbatim, with nothing added but the end token between records of .jsonl or .parquet.

    Args:
        path: UTF-8 text, .jsonl or .parquet; text and .jsonl also as .gz, .xz or .zst.
        tokenizer_path: The model's tokenizer.
    Raises:
        InputError: not one file, broken, not UTF-8, or empty.
    """
    require_text_file(path)
    tokenizer = load_tokenizer(tokenizer_path)
    starts, words, document_ended = [0], 0, False
    with TokenFile(vocab_size=tokenizer.vocab_size) as file:
        for chunk in move_cuts(file_chunks(path, separator=None), tokenizer):
            # add the end token before the next record, not after each, so that none is added at the end of the text
            if document_ended:
                file.add([tokenizer.end_of_document])
                starts.append(file.count)
            file.add(tokenizer.encode_each([chunk.text])[0])
            words += len(chunk.text.split())
            document_ended = chunk.ends_document
        tokens = file.read()
    if not len(tokens):
        raise InputError(f"evaluation text {path} holds no text: give another file")
    documents = np.unique([start for start in starts if start < len(tokens)])
    return TokenStream(path.name, tokens, words, documents, joins=documents)


def require_text_file(path: Path) -> None:
    """Check that a path names one file whose beginning can be read as text.

    Raises:
        InputError: it does not.
    """
    if path.is_dir():
        raise InputError(f"evaluation text {path} is a folder: give one file of it")
    if len(source_files(str(path))) != 1 or not path.is_file():
        raise InputError(f"evaluation text {path} is not a single file: give the path of one")
    file_kind(path)


def identify_text(tokens: NDArray[np.integer], tokenizer_path: Path) -> TextIdentity:
    """Return what tells a text from others: the same for any tokenizer that does not change text.

    Args:
        tokens: The text, [tokens].
        tokenizer_path: The tokenizer that made them.
    """
    tokenizer, text, length = load_tokenizer(tokenizer_path), hashlib.sha256(), 0
    for first in range(0, len(tokens), READ_AT_ONCE):
        spelled = tokenizer.spell(tokens[first : first + READ_AT_ONCE].tolist())
        text.update(spelled)
        length += len(spelled)
    return TextIdentity(text.hexdigest(), length)


def identify_documents(
    text: TextIdentity, tokens: NDArray[np.integer], tokenizer_path: Path, *, begins: NDArray[np.bool_] | None
) -> str | None:
    """Return a hash of a text and of the bytes at which its documents begin.

    None if attention does not stay inside documents, or if the text is one document.

    Args:
        text: The text.
        tokens: Its tokens, [tokens].
        tokenizer_path: The tokenizer that made them.
        begins: Whether each token begins a document, [tokens]; None if attention sees all.
    """
    if begins is None:
        return None
    tokenizer, places, place = load_tokenizer(tokenizer_path), [], 0
    first = np.flatnonzero(begins)
    for start, end in pairwise([*first.tolist(), len(tokens)]):
        for part in range(start, end, READ_AT_ONCE):
            place += len(tokenizer.spell(tokens[part : min(end, part + READ_AT_ONCE)].tolist()))
        places.append(place)
    inside = np.unique([place for place in places if 0 < place < text.bytes]).astype("<i8")
    if not len(inside):
        return None
    return hashlib.sha256(text.sha256.encode() + inside.tobytes()).hexdigest()


def unigram_perplexity(prepared: Prepared, tokens: NDArray[np.integer]) -> float:
    """Return the perplexity of tokens under their frequencies in the training text, with one added to each count.

    Args:
        prepared: Prepared data; its `split` separates training text from held-out text.
        tokens: Tokens to predict, [tokens].
    """
    counts = _training_counts(prepared) + 1
    log_probabilities = np.log(counts / counts.sum())
    parts = (tokens[first : first + READ_AT_ONCE] for first in range(0, len(tokens), READ_AT_ONCE))
    return math.exp(-math.fsum(float(log_probabilities[part].sum()) for part in parts) / len(tokens))


def _training_counts(prepared: Prepared) -> NDArray[np.int64]:
    """Return how often each token occurs in the training text, [vocab]."""
    # saved counts are of the whole text, since data.split may change later: subtract the held-out part
    counts = _load_counts(prepared.folder / UNIGRAM_NAME)
    for part in prepared.parts:
        held_out = held_out_sequences(part.sequences, share=prepared.split)
        for tokens in iter_sequences(prepared.prefix(part), sequences=held_out):
            counts = counts - np.bincount(tokens, minlength=prepared.vocab_size)
    return counts


def _words(prepared: Prepared, part: Part, sequences: NDArray[np.int64]) -> int | None:
    if part.in_place:
        return None
    return int(_load_counts(words_path(prepared.prefix(part)))[sequences].sum())


def _load_counts(file: Path) -> NDArray[np.int64]:
    """Return the counts that `prepare` wrote beside the tokens, which training does not need.

    Raises:
        InputError: they are missing or damaged.
    """
    try:
        with file.open("rb") as content:
            counts: NDArray[np.int64] = np.load(content)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise InputError(
            f"prepared data {file} cannot be read ({reason}): copy it from where the data was prepared, or prepare it "
            "again in another data.dir"
        ) from None
    return counts


def _starts(
    prepared: Prepared, part: Part, sequences: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first token of each document and of each sequence among a part's chosen ones, counted from 0."""
    prefix = prepared.prefix(part)
    documents, lengths = document_numbers(prefix)[sequences], read_index(prefix).lengths[sequences]
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    is_first = np.diff(documents, prepend=-1) != 0
    # an empty sequence starts where the next one does, the last one nowhere
    documents = np.unique(starts[is_first & (starts < lengths.sum())])
    return documents, np.unique(starts[lengths > 0])
