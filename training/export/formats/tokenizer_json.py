"""Write a model's tokenizer as transformers loads it: a tokenizer.json with the same ids, and its configuration."""

from collections.abc import Mapping
from pathlib import Path

from configs.errors import InputError
from data_pipeline.tokenizer import load_tokenizer


def require_rows(tokens: int, *, tokenizer: Path, rows: int) -> None:
    """Refuse a tokenizer with more tokens than a model's embedding has rows.

    Raises:
        InputError: names both numbers.
    """
    if tokens > rows:
        raise InputError(
            f"tokenizer {tokenizer} has {tokens} pieces, the model's embedding {rows} rows: "
            "give the tokenizer that the model was trained with"
        )


def write_tokenizer(tokenizer: Path, out: Path, *, rows: int) -> Mapping[str, int]:
    """Write the tokenizer's files; return the ids of its special tokens by role (`bos_token`, ...).

    Args:
        tokenizer: A sentencepiece .model file, or a tokenizer.json.
        out: The folder.
        rows: Rows of the model's embedding.
    Raises:
        InputError: the tokenizers library would give other ids, or the tokenizer has more tokens than rows.
    """
    loaded = load_tokenizer(tokenizer)
    require_rows(loaded.vocab_size, tokenizer=tokenizer, rows=rows)
    # not the library's save: on a full disk that raises a bare Exception
    for name, content in loaded.export_files().items():
        (out / name).write_bytes(content)
    return loaded.special_ids
