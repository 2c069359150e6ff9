"""What every tokenizer does, and how the right kind is loaded for a file."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.tokenizer_files import find_tokenizer, is_tokenizer_json

logger = logging.getLogger(__name__)

_NO_IDS = np.zeros(0, np.int32)


class Tokenizer(ABC):
    """Encode text to token ids and decode them.

    Control tokens (`</s>`) that are spelled out in a text are plain text.

    Attributes:
        path: Its file.
        sha256: What tells it from others; see `tokenizer_sha256`.
        special_ids: Ids of its special tokens by role; see `ROLES`.
        end_of_document: Id of the token that ends a document.
        vocab_size: All ids are below it.
    """

    def __init__(self, *, path: Path, sha256: str, special_ids: Mapping[str, int], vocab_size: int) -> None:
        self.path = path
        self.sha256 = sha256
        self.special_ids = special_ids
        self.end_of_document = special_ids["eos_token"]
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        ids: list[int] = self.encode_each([text])[0].tolist()
        return ids

    def encode_each(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each text, [tokens], with nothing added. All cores take part."""
        split = [self._split(text) for text in texts]
        encoded = iter(self._encode_parts(list(chain.from_iterable(split))))
        return [np.concatenate([_NO_IDS, *islice(encoded, len(parts))]) for parts in split]

    @abstractmethod
    def _split(self, text: str) -> list[str]:
        """Return a text in parts that can be encoded one by one: their ids together are those of the text."""

    @abstractmethod
    def _encode_parts(self, parts: list[str]) -> Iterable[NDArray[np.int32]]:
        """Return the token ids of each part, [tokens]."""

    @abstractmethod
    def last_cut(self, text: str) -> int:
        """Return where to cut a text that goes on, so that each side has the ids that it has in the whole.

        Its length if there is no such place.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; control tokens and ids that no token has decode to nothing."""

    @abstractmethod
    def decode_each(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of token ids as they come, in whole characters; joined, it is what `decode` returns of all.

        A rare character is several tokens: its text is yielded with the last of them.
        """

    @abstractmethod
    def spell(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 that token ids stand for: the text's own bytes, unless the tokenizer changes text.

        Control tokens stand for nothing.
        """

    @abstractmethod
    def export_files(self) -> dict[str, bytes]:
        """Return the files of a tokenizer that transformers loads, by name; it gives the same ids.

        Raises:
            InputError: there is no such tokenizer.
        """

    @abstractmethod
    def check(self, *, vocab_size: int) -> None:
        """Refuse a tokenizer that a run cannot use; warn if it does not give every text back.

        Args:
            vocab_size: Rows of the run's embedding.
        Raises:
            InputError: names what does not fit.
        """

    def _warn_of_end_in_text(self, end: str) -> None:
        """Warn of an end token, spelled `end`, that a text may hold: documents end there, and it counts as no text."""
        if self.end_of_document in self.encode(f"a{end} {end}"):
            logger.warning(
                "tokenizer %s gives the token that ends documents for %r in a text too, which ends a document there: "
                "name another as eos_token, or keep it out of the text",
                self.path,
                end,
            )

    def _require_rows(self, vocab_size: int) -> None:
        """Refuse an embedding with fewer rows than tokens; say so if it has more, as imported models may."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"data.vocab_size must be at least that of data.tokenizer {self.path} ({self.vocab_size}), got "
                f"{vocab_size}: use {self.vocab_size}"
            )
        if self.vocab_size < vocab_size:
            logger.info(
                "data.vocab_size %s is %s more than the tokenizer's %s: those rows of the embedding stand for no token",
                vocab_size,
                vocab_size - self.vocab_size,
                self.vocab_size,
            )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a sentencepiece .model or a tokenizer.json.

    Args:
        path: The file, or a folder that holds it.
    Raises:
        InputError: the file cannot be read or is of neither kind, or no token ends documents.
    """
    file = find_tokenizer(path)
    # imported here: a run has one kind, and must not wait for the library of the other
    if is_tokenizer_json(file):
        from data_pipeline.json_tokenizer import JsonTokenizer

        return JsonTokenizer.load(file)
    from data_pipeline.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer.load(file)
