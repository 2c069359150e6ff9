"""Paths of Megatron's .bin/.idx. Imports no numpy: `check`, which must start fast, looks for them too."""

import os
from pathlib import Path

from configs.errors import InputError


def bin_path(prefix: Path) -> Path:
    """Return the path of the token file."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of the index: sequence lengths and offsets."""
    return prefix.with_name(f"{prefix.name}.idx")


def words_path(prefix: Path) -> Path:
    """Return the path of the word counts, one per sequence (our addition: Megatron has no such file)."""
    return prefix.with_name(f"{prefix.name}.words.npy")


def find_prefix(path: str) -> Path | None:
    """Return the prefix of the Megatron data that a source names as `x.bin` or `x`; None for other sources.

    Raises:
        InputError: a .bin without its .idx.
    """
    file = Path(path)
    if not file.name:  # `.` and `/` are folders
        return None
    prefix = file.with_suffix("") if file.suffix == ".bin" else file
    # not Path.is_file, which raises an error if a name is too long or a folder cannot be searched
    has_tokens, has_index = os.path.isfile(bin_path(prefix)), os.path.isfile(idx_path(prefix))
    if file.suffix == ".bin" and has_tokens and not has_index:
        raise InputError(f"data source {path} has no index {idx_path(prefix)} beside it: copy that too")
    return prefix if has_tokens and has_index else None
