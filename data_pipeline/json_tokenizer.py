"""The tokenizer.json of Hugging Face's `tokenizers`, which models from elsewhere come with."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from configs.errors import InputError
from configs.paths import TOKENIZER_CONFIG, TOKENIZER_JSON
from data_pipeline.hashes import joined_sha256, sha256_of
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import (
    ROLES,
    added_tokens,
    huggingface_config,
    read_json_object,
    tokenizer_files,
)

logger = logging.getLogger(__name__)

# Byte-level BPE writes each byte as one character: itself if it is printable in Latin-1, else one from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}

_BLOOM_WORDS = " ?[^(\\s|[.,!?…。，、।۔،])]+"
# Parts of a text, cut at a newline before a letter: GPT-2's words leave that newline alone, so they can be cut before
# it; BLOOM's take all that is between two words as one, so they can be cut behind it.
_BEFORE_NEWLINE = re.compile(r"[\s\S]{1,10000}(?:[\s\S]*?(?=\n[^\W\d_])|[\s\S]*)")
_BEHIND_NEWLINE = re.compile(r"[\s\S]{1,10000}(?:[\s\S]*?\n(?=[^\W\d_])|[\s\S]*)")


class JsonTokenizer(Tokenizer):
    """A tokenizer of any kind that `tokenizers` loads and that gives the same ids every time.

    It may change text before it encodes it; `check` says so.
    """

    def __init__(
        self, loaded: tokenizers.Tokenizer, document: dict[str, Any], *, path: Path, sha256: str, tokens: dict[str, str]
    ) -> None:
        """Wrap a loaded tokenizer.

        Args:
            loaded: The tokenizer.
            document: The content of its file.
            path: Its file.
            sha256: See `Tokenizer`.
            tokens: Its special tokens by role, the end token among them.
        """
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True  # one that is spelled out in a text is plain text
        self._tokenizer, self._document = loaded, document
        self._parts = _parts_pattern(document)
        self._special = {token["content"] for token in added_tokens(path, document) if token.get("special")}
        ids: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
        special_ids = {role: ids[text] for role, text in tokens.items() if text in ids}
        # not their number: ids may have gaps
        super().__init__(path=path, sha256=sha256, special_ids=special_ids, vocab_size=max(ids.values()) + 1)

    @classmethod
    def load(cls, path: Path) -> "JsonTokenizer":
        """Load a tokenizer.json, with the end token that the tokenizer_config.json beside it names, if it is there.

        Raises:
            InputError: it is not a tokenizer.json, encodes at random, or has no token that ends documents.
        """
        files = tokenizer_files(path)
        content = files[TOKENIZER_JSON]
        document = read_json_object(path, content)
        try:
            loaded = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # noqa: BLE001  it raises nothing narrower
            raise InputError(
                f"tokenizer {path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads ({error}): "
                "give one that it has saved"
            ) from None
        if dropout := document["model"].get("dropout"):
            raise InputError(
                f"tokenizer {path} drops merges at random (dropout {dropout}): set dropout to null in a copy of it"
            )
        kept = json.loads(files[TOKENIZER_CONFIG])
        tokens = {role: kept[role] for role in ROLES if role in kept}
        if loaded.token_to_id(tokens["eos_token"]) is None:
            raise InputError(
                f"tokenizer {path} has no token {tokens['eos_token']!r}, the eos_token of the {TOKENIZER_CONFIG} "
                "beside it: name one that it has"
            )
        return cls(loaded, document, path=path, sha256=joined_sha256(map(sha256_of, files.values())), tokens=tokens)

    def _split(self, text: str) -> list[str]:
        return [text] if self._parts is None else self._parts.findall(text)

    def _encode_parts(self, parts: list[str]) -> Iterable[NDArray[np.int32]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001  it raises nothing narrower
            raise InputError(f"tokenizer {self.path} cannot encode every text ({error}): give another") from None
        return (np.array(each.ids, np.int32) for each in encoded)

    def last_cut(self, text: str) -> int:
        """Return the last newline before a letter, or what follows it; see `Tokenizer`."""
        newline = len(text) if self._parts else 0
        while (newline := text.rfind("\n", 0, newline)) > 0:
            if text[newline + 1 : newline + 2].isalpha():
                return newline + (self._parts is _BEHIND_NEWLINE)
        return len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; see `Tokenizer`."""
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

    def decode_each(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of token ids as they come; see `Tokenizer`."""
        # What was yielded last is decoded again with what follows: a decoder may treat the first token differently.
        before: list[int] = []
        waiting: list[int] = []
        for token in ids:
            waiting.append(token)
            text, known = self.decode([*before, *waiting]), len(self.decode(before))
            if len(text) > known and not text.endswith("\ufffd"):  # else the rest of a character may follow
                yield text[known:]
                before, waiting = waiting, []
        if waiting:
            yield self.decode([*before, *waiting])[len(self.decode(before)) :]

    def spell(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 that token ids stand for; see `Tokenizer`."""
        if self._spelled is None:
            return self.decode(ids).encode()
        return b"".join([self._spelled.get(token, b"") for token in ids])

    @cached_property
    def _spelled(self) -> dict[int, bytes] | None:
        """The bytes of each token by id; None where the text of a token depends on its neighbours."""
        if (self._document.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        return {number: b"" if text in self._special else _bytes_of(text) for text, number in ids.items()}

    def export_files(self) -> dict[str, bytes]:
        """Return the tokenizer's own file and a configuration that adds no token; see `Tokenizer`."""
        tokens = {role: str(self._tokenizer.id_to_token(number)) for role, number in self.special_ids.items()}
        return {TOKENIZER_JSON: self.path.read_bytes(), TOKENIZER_CONFIG: huggingface_config(tokens)}

    def check(self, *, vocab_size: int) -> None:
        """Refuse a tokenizer that adds tokens, or has more than the embedding rows; see `Tokenizer`."""
        plain, with_added = self.encode("a"), self._tokenizer.encode("a").ids
        if with_added != plain or self.encode(""):
            raise InputError(
                f"tokenizer {self.path} adds special tokens to each text ({with_added} for 'a' instead of {plain}), "
                'which training does not: set "post_processor" to null in a copy of it'
            )
        self._warn_if_text_changes()
        self._warn_of_end_in_text(str(self._tokenizer.id_to_token(self.end_of_document)))
        self._require_rows(vocab_size)

    def _warn_if_text_changes(self) -> None:
        for text in (*EDGE_CASE_TEXTS, *self._special):
            back = self.decode(self.encode(text))
            if back != text:
                normalizer = json.dumps(self._document.get("normalizer"), ensure_ascii=False)
                logger.warning(  # in ASCII: a text and its Unicode normal form look alike
                    "tokenizer %s changes text: %a comes back as %a (its normalizer: %.100s); the model learns the "
                    "changed text",
                    self.path,
                    text,
                    back,
                    normalizer,
                )
                return


def _parts_pattern(document: dict[str, Any]) -> re.Pattern[str] | None:
    """Return a pattern of parts of a text that can be encoded one by one; None if a text cannot be cut.

    It can where text is first split into the words of GPT-2 or BLOOM, and nothing else looks across a newline.
    """
    words = document.get("pre_tokenizer") or {}
    first, *further = (words["pretokenizers"] if words.get("type") == "Sequence" else [words]) or [{}]
    added = [token for token in document.get("added_tokens") or [] if not token.get("special")]
    if (
        (document.get("normalizer") or {}).get("type") not in (None, "NFC")
        or any(step.get("type") != "ByteLevel" or step.get("add_prefix_space") for step in further)
        or any(token.get("lstrip") or token.get("rstrip") or re.search(r"\n|^\w", token["content"]) for token in added)
    ):
        return None
    if first.get("type") == "ByteLevel" and first.get("use_regex", True) and not first.get("add_prefix_space"):
        return _BEFORE_NEWLINE
    if first == {"type": "Split", "pattern": {"Regex": _BLOOM_WORDS}, "behavior": "Isolated", "invert": False}:
        return _BEHIND_NEWLINE
    return None


def _bytes_of(token: str) -> bytes:
    # an added token may hold characters that stand for no byte: it is written as it is
    if any(character not in _BYTES for character in token):
        return token.encode()
    return bytes(_BYTES[character] for character in token)
