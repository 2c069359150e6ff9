"""The tokenizer: sentencepiece BPE that gives text back to the byte and encodes alike in other runtimes."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from configs.errors import InputError
from configs.files import whole_file
from data_pipeline.vocabulary import read_vocabulary

SAMPLE = 10_000_000
"""Characters that a tokenizer is trained on at most."""

_LONGEST_SENTENCE = 16_000
_SMALLEST = 300  # the least that data.vocab_size may be
# Lossless: bytes for rare characters, nothing normalised, no space added or removed. BPE: its ids are the same in
# every runtime, those of unigram are not.
_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}


class Tokenizer:
    """Text to token ids and back.

    `decode(encode(text)) == text` for any text, but for U+2581, which sentencepiece writes for a space and so
    gives back as one. Control pieces (`</s>`) spelled out in a text are plain text.
    """

    def __init__(self, model: bytes, *, path: Path, end_of_document: int, newlines_merge: bool) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._newlines_merge = newlines_merge
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.end_of_document = end_of_document
        self.vocab_size = int(self._processor.vocab_size())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Return the tokenizer of a .model file.

        Raises:
            InputError: no such file, not sentencepiece, loses text, encodes otherwise elsewhere, or has no end piece.
        """
        found = read_vocabulary(path)
        if found.end_id is None:
            raise InputError(f"tokenizer {path} has no end piece to end documents with: train it with an eos_id")
        newlines_merge = any("\n" in piece.text and len(piece.text) > 1 for piece in found.pieces)
        return cls(path.read_bytes(), path=path, end_of_document=found.end_id, newlines_merge=newlines_merge)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, nothing added."""
        if self._newlines_merge:
            return list(self._processor.encode(text))
        # the same ids as in one go, since no merge crosses a newline, in a third of the time
        *lines, last = text.split("\n")
        encoded = self._processor.encode([f"{line}\n" for line in lines] + [last])
        return [token for line in encoded for token in line]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; control pieces have none."""
        return str(self._processor.decode([int(token) for token in ids]))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, out: Path) -> Tokenizer:
    """Train a tokenizer on at most `SAMPLE` characters and write it; the same texts give the same file.

    Args:
        texts: Text, read as far as needed.
        vocab_size: Pieces, the 256 bytes and 3 control pieces among them.
        out: The .model file.
    Raises:
        InputError: the text allows fewer pieces, or needs more for its characters; and what `texts` raises.
    """
    model = io.BytesIO()
    raised: list[BaseException] = []
    # sentencepiece says on the standard error stream what its exception says too
    sentencepiece.set_min_log_level(3)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_watched(_sentences(texts), raised),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=4 * _LONGEST_SENTENCE,
            **_OPTIONS,
        )
    except RuntimeError as error:
        raise (raised[0] if raised else _explained(str(error), vocab_size)) from None
    with whole_file(out) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer.load(out)


def _watched(sentences: Iterator[str], raised: list[BaseException]) -> Iterator[str]:
    """Yield sentences, keeping what they raise: sentencepiece makes a RuntimeError of it, of Ctrl-C too."""
    try:
        yield from sentences
    except BaseException as error:
        raised.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                yield line[start : start + _LONGEST_SENTENCE]
        characters += len(text)
        if characters >= SAMPLE:
            return


def _explained(message: str, vocab_size: int) -> InputError:
    if found := re.search(r"too high .*<= (\d+)", message):
        largest = int(found[1])
        todo = f"use {largest} or less, or add text" if largest >= _SMALLEST else "add text"
        return InputError(f"data.vocab_size {vocab_size} is larger than the {largest} the text allows: {todo}")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return InputError(
            f"data.vocab_size {vocab_size} is smaller than the characters of the text need: use {found[1]} or more"
        )
    reason = " ".join(message.split()).split("] ")[-1]
    return InputError(
        f"no tokenizer of data.vocab_size {vocab_size} can be trained on this text (sentencepiece says {reason!r}): "
        "is it text? add more"
    )
