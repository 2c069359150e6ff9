"""The files of a tokenizer: how they are found, what a copy of them holds, and the hash that identifies them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_NAME
from data_pipeline.hashes import joined_sha256, sha256_of

ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
"""Keys of tokenizer_config.json that name a special token."""

# taken as the end of documents where tokenizer_config.json names no eos_token; the first that the tokenizer has
_END_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
# Transformers' value for "no limit". With ALiBi there is none, and any smaller number makes transformers warn about
# long texts.
_NO_LIMIT = int(1e30)


def kept_names(names: Collection[str]) -> tuple[str, ...]:
    """Return which files of prepared data or of a checkpoint are its tokenizer; `load_tokenizer` takes the first."""
    return (TOKENIZER_JSON, TOKENIZER_CONFIG) if TOKENIZER_JSON in names else (TOKENIZER_NAME,)


def find_tokenizer(path: Path) -> Path:
    """Return the file of a tokenizer: the path itself or, if it is a folder, a file in it, which may not exist."""
    if not path.is_dir():
        return path
    return path / kept_names([name for name in (TOKENIZER_JSON,) if (path / name).is_file()])[0]


def is_tokenizer_json(file: Path) -> bool:
    """Return whether a tokenizer's file is a tokenizer.json, by its name or by how it begins."""
    # a sentencepiece model never begins with a brace
    return file.suffix.lower() == ".json" or _read(file)[:1] == b"{"


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return the files that a copy of a tokenizer consists of, by name; a copy of the copy is the same.

    A sentencepiece model is one file. A tokenizer.json does not say which token ends a document, so its
    tokenizer_config.json is the second, without what has no use here.

    Args:
        path: The tokenizer's file, or a folder that holds it.
    Raises:
        InputError: it cannot be read, or no token ends documents.
    """
    file = find_tokenizer(path)
    if path.is_dir() and not file.is_file():
        raise InputError(f"tokenizer {path} is a folder without {TOKENIZER_JSON} or {TOKENIZER_NAME}: give the file")
    if not is_tokenizer_json(file):
        return {TOKENIZER_NAME: _read(file)}
    content = _read(file)
    return {TOKENIZER_JSON: content, TOKENIZER_CONFIG: huggingface_config(_special_tokens(file, content))}


def tokenizer_sha256(path: Path) -> str:
    """Return the hash that identifies a tokenizer, whatever its files are named.

    Raises:
        InputError: see `tokenizer_files`.
    """
    return joined_sha256(map(sha256_of, tokenizer_files(path).values()))


def huggingface_config(tokens: Mapping[str, str]) -> bytes:
    """Return a tokenizer_config.json for transformers that adds no token to a text.

    Args:
        tokens: Special tokens by role, as in `ROLES`.
    """
    config = {
        # transformers 5 writes TokenizersBackend here, which transformers 4 cannot load.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        # transformers 4 would add token_type_ids, which Bloom's generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def read_json_object(file: Path, content: bytes) -> dict[str, Any]:
    """Return the object that a tokenizer's JSON file holds.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer file {file} is not JSON, or is cut off ({error}): copy it again") from None
    if not isinstance(document, dict):
        raise InputError(f"tokenizer file {file} must hold a JSON object: give a tokenizer.json of Hugging Face")
    return document


def added_tokens(file: Path, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of `added_tokens` in a tokenizer.json.

    Raises:
        InputError: they are not what `tokenizers` writes.
    """
    tokens = document.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in tokens
    ):
        raise InputError(f"tokenizer file {file} has added_tokens without content: save it again with `tokenizers`")
    return tokens


def _special_tokens(file: Path, content: bytes) -> dict[str, str]:
    """Return the special tokens of a tokenizer.json by role; the end token is always among them."""
    beside = file.with_name(TOKENIZER_CONFIG)
    config = read_json_object(beside, _read(beside)) if beside.is_file() else {}
    named = {role: _text_of(config.get(role)) for role in ROLES}
    if named["eos_token"] is None:
        tokens = added_tokens(file, read_json_object(file, content))
        special = [token["content"] for token in tokens if token.get("special")]
        named["eos_token"] = next((text for text in _END_TOKENS if text in special), None)
        if named["eos_token"] is None:
            raise InputError(
                f"tokenizer {file} names no token that ends a document: write a special token of it into {beside}, as "
                f'{{"eos_token": "{special[0] if special else _END_TOKENS[0]}"}}'
            )
    return {role: text for role, text in named.items() if text is not None}


def _text_of(token: object) -> str | None:
    """Return the text of a token in tokenizer_config.json: a string, or an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error.strerror}): check the path") from None
