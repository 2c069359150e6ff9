"""Sentencepiece BPE that is lossless and encodes identically in other runtimes: the tokenizer that `prepare` trains."""

import codecs
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from configs.errors import InputError
from configs.files import whole_file
from configs.paths import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_NAME
from data_pipeline.portable import build_tokenizer, check_portable
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import huggingface_config
from data_pipeline.vocabulary import read_vocabulary

SAMPLE_CHARACTERS = 10_000_000
"""Most characters that a tokenizer is trained on."""

_SOME_LINES = re.compile(r"[\s\S]{1,200}[^\n]*\n?")  # sentencepiece is slower at very short and at long texts
_END_SECONDS = 0.3  # that Ctrl-C waits for the sample's reader
_MAX_SENTENCE = 16_000  # characters
_MIN_VOCAB_SIZE = 300  # the schema's bound of data.vocab_size
# Lossless: bytes for rare characters, no normalization, no space added or removed. BPE, since unigram ids differ
# between runtimes.
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


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    `decode(encode(text)) == text` for any text without U+2581, which sentencepiece uses for a space and decodes to
    one.
    """

    def __init__(self, model: bytes, *, path: Path, special_ids: Mapping[str, int], newlines_merge: bool) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._newlines_merge = newlines_merge
        super().__init__(
            path=path,
            sha256=hashlib.sha256(model).hexdigest(),
            special_ids=special_ids,
            vocab_size=int(self._processor.vocab_size()),
        )

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """Load a .model file.

        Raises:
            InputError: see `read_vocabulary`; or the model has no end piece.
        """
        vocabulary = read_vocabulary(path)
        if vocabulary.end_id is None:
            raise InputError(f"tokenizer {path} has no end piece to end documents with: train it with an eos_id")
        ids = {
            "unk_token": vocabulary.unknown_id,
            "bos_token": vocabulary.begin_id,
            "eos_token": vocabulary.end_id,
            "pad_token": vocabulary.pad_id,
        }
        # a model with such a piece may merge characters of two lines into one token
        newlines_merge = any("\n" in piece.text and len(piece.text) > 1 for piece in vocabulary.pieces)
        return cls(
            path.read_bytes(),
            path=path,
            special_ids={role: number for role, number in ids.items() if number is not None},
            newlines_merge=newlines_merge,
        )

    def _split(self, text: str) -> list[str]:
        # no merge crosses a newline, so encoding some lines at a time gives the same ids, in a third of the time
        return [text] if self._newlines_merge else _SOME_LINES.findall(text)

    def _encode_parts(self, parts: list[str]) -> Iterable[NDArray[np.int32]]:
        encoded: list[NDArray[np.int32]] = self._processor.encode(parts, return_type="numpy")
        return encoded

    def last_cut(self, text: str) -> int:
        """Return the length: texts are cut behind a newline; see `Tokenizer`."""
        return len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; see `Tokenizer`."""
        return str(self._processor.decode([*self._with_piece(ids)]))

    def decode_each(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of token ids as they come; see `Tokenizer`.

        A character without a piece is up to four tokens, one a byte.
        """
        waiting: list[int] = []  # bytes of a character that is not complete
        for token in self._with_piece(ids):
            waiting.append(token)
            decided = len(waiting)
            if self._processor.is_byte(token):
                # <0xE2> to a byte; `decided` are those that later bytes do not change
                raw = bytes(int(self._processor.id_to_piece(byte)[1:-1], 16) for byte in waiting)
                decided = codecs.utf_8_decode(raw, "replace", False)[1]
            if decided:
                yield self.decode(waiting[:decided])
                del waiting[:decided]
        if waiting:
            yield self.decode(waiting)

    def _with_piece(self, ids: Iterable[int]) -> Iterator[int]:
        """Yield the ids of pieces: a model's embedding may have more rows, and it may generate their ids."""
        return (int(token) for token in ids if token < self.vocab_size)

    def spell(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 that token ids stand for; see `Tokenizer`."""
        return b"".join([self._spelled[token] for token in ids])

    @cached_property
    def _spelled(self) -> list[bytes]:
        return [self._bytes_of(token) for token in range(self.vocab_size)]

    def _bytes_of(self, token: int) -> bytes:
        if self._processor.is_control(token):
            return b""
        text: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):  # <0x0A>
            return bytes([int(text[1:-1], 16)])
        return text.replace("\u2581", " ").encode()

    def export_files(self) -> dict[str, bytes]:
        """Return a tokenizer.json with the same ids, its configuration and the model; see `Tokenizer`."""
        tokens = {role: self._processor.id_to_piece(number) for role, number in self.special_ids.items()}
        return {
            TOKENIZER_JSON: build_tokenizer(read_vocabulary(self.path)).to_str(pretty=True).encode(),
            TOKENIZER_CONFIG: huggingface_config(tokens),
            TOKENIZER_NAME: self.path.read_bytes(),
        }

    def check(self, *, vocab_size: int) -> None:
        """Refuse a model that no export can hold, or has more pieces than rows; see `Tokenizer`."""
        check_portable(self)
        self._warn_of_end_in_text(self._processor.id_to_piece(self.end_of_document))
        self._require_rows(vocab_size)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, out: Path) -> SentencePieceTokenizer:
    """Train a tokenizer on at most `SAMPLE_CHARACTERS` and write it. The same texts give the same file.

    Args:
        texts: Text, read only as far as needed.
        vocab_size: Number of pieces, including 256 bytes and 3 control pieces.
        out: The .model file to write.
    Raises:
        InputError: the text allows fewer pieces, or its characters need more; or what `texts` raises.
    """
    model = io.BytesIO()
    raised: list[BaseException] = []
    stopped = threading.Event()
    # silence sentencepiece's log: its exception has the same message
    sentencepiece.set_min_log_level(3)
    train = partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=_keep_errors(_sentences(texts), raised, stopped),
        model_writer=model,
        vocab_size=vocab_size,
        max_sentence_length=4 * _MAX_SENTENCE,  # in bytes: UTF-8 has at most 4 per character
        **_OPTIONS,
    )
    try:
        _run_in_thread(train, stopped)
    except RuntimeError as error:
        raise (raised[0] if raised else _training_error(str(error), vocab_size)) from None
    with whole_file(out) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer.load(out)


def _run_in_thread(work: Callable[[], None], stopped: threading.Event) -> None:
    """Run a call into C++ so that Ctrl-C interrupts it: the main thread handles signals only between Python's steps.

    The thread then goes on until the process ends; `stopped` tells it to read no more.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001  raised below, in the thread that waits
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        done.result()
    except KeyboardInterrupt:
        stopped.set()
        thread.join(_END_SECONDS)  # if it read text as the interpreter ends, C++ would abort the process
        raise


def _keep_errors(sentences: Iterator[str], raised: list[BaseException], stopped: threading.Event) -> Iterator[str]:
    """Yield sentences until `stopped`, and record their exceptions: sentencepiece turns any into a RuntimeError."""
    try:
        for sentence in sentences:
            if stopped.is_set():
                raise InterruptedError
            yield sentence
    except BaseException as error:
        raised.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    # sentencepiece silently skips sentences that are too long, so cut them
    characters = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_SENTENCE):
                yield line[start : start + _MAX_SENTENCE]
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            return


def _training_error(message: str, vocab_size: int) -> InputError:
    """Return our error for a message of sentencepiece's trainer."""
    if match := re.search(r"too high .*<= (\d+)", message):
        largest = int(match[1])
        advice = f"use {largest} or less, or add text" if largest >= _MIN_VOCAB_SIZE else "add text"
        return InputError(f"data.vocab_size {vocab_size} is larger than the {largest} the text allows: {advice}")
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return InputError(
            f"data.vocab_size {vocab_size} is smaller than the characters of the text need: use {match[1]} or more"
        )
    # drop the location in sentencepiece's source code, which ends with a bracket
    reason = " ".join(message.split()).split("] ")[-1]
    return InputError(
        f"no tokenizer of data.vocab_size {vocab_size} can be trained on this text (sentencepiece says {reason!r}): "
        "check that it is text, or add more"
    )
