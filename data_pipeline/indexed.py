"""Megatron's .bin/.idx as numpy sees them: checks and counts that need neither torch nor megatron.

Source: megatron.core.datasets.indexed_dataset, index version 1.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Index:
    """What an .idx says of its .bin."""

    dtype: np.dtype[np.integer]
    lengths: NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    documents: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def bin_path(prefix: Path) -> Path:
    """Return the file of tokens."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the file of sequence lengths and places."""
    return prefix.with_name(f"{prefix.name}.idx")


def words_path(prefix: Path) -> Path:
    """Return the file of each sequence's white space separated words, which is ours and not Megatron's."""
    return prefix.with_name(f"{prefix.name}.words.npy")


def find_prefix(path: str) -> Path | None:
    """Return the prefix of data prepared for Megatron that a source names (`x.bin` or `x`), None for other sources.

    Raises:
        InputError: a .bin without its .idx.
    """
    file = Path(path).expanduser()
    if not file.name:  # `.` and `/` are folders
        return None
    prefix = file.with_suffix("") if file.suffix == ".bin" else file
    if file.suffix == ".bin" and bin_path(prefix).is_file() and not idx_path(prefix).is_file():
        raise InputError(f"data source {path} has no index {idx_path(prefix)} beside it: copy that too")
    return prefix if bin_path(prefix).is_file() and idx_path(prefix).is_file() else None


def read_index(prefix: Path) -> Index:
    """Return the index of a .bin after checking that the two files fit.

    Raises:
        InputError: not an index, of another version or kind, or one of the files is cut short.
    """
    file = idx_path(prefix)
    content = np.memmap(file, mode="r", dtype=np.uint8) if file.stat().st_size else np.zeros(0, np.uint8)
    if len(content) < _HEADER.size:
        raise InputError(f"{file} is cut short ({len(content)} bytes): copy it again")
    magic, version, code, sequences, marks = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise InputError(f"{file} is not a Megatron index of integer tokens, version 1: prepare the data again")
    if len(content) < _HEADER.size + 12 * sequences + 8 * marks:
        raise InputError(f"{file} is cut short ({len(content)} bytes): copy it again")
    lengths = np.frombuffer(content, np.int32, sequences, _HEADER.size)
    places = np.frombuffer(content, np.int64, sequences, _HEADER.size + 4 * sequences)
    index = Index(np.dtype(_DTYPES[code]), lengths, documents=max(0, marks - 1))
    expected = index.tokens * index.dtype.itemsize
    found = bin_path(prefix).stat().st_size
    if found != expected:
        raise InputError(f"{bin_path(prefix)} has {found} bytes where its index says {expected}: copy it again")
    ends = np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
    if not np.array_equal(places, ends - lengths.astype(np.int64) * index.dtype.itemsize):
        raise InputError(f"{file} has sequences that overlap or leave gaps: prepare the data again")
    return index


def read_sequences(prefix: Path, *, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of some sequences, one after the other, [tokens].

    Raises:
        InputError: see `read_index`.
    """
    index = read_index(prefix)
    ends = np.cumsum(index.lengths, dtype=np.int64)
    tokens = _tokens(prefix, index)
    parts = [tokens[ends[i] - index.lengths[i] : ends[i]] for i in sequences]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def histogram(prefix: Path, *, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each token stands in a .bin, [vocab].

    Raises:
        InputError: see `read_index`; a token is negative or not less than the vocabulary size.
    """
    tokens = _tokens(prefix, read_index(prefix))
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        least, most = int(chunk.min()), int(chunk.max())
        if least < 0 or most >= vocab_size:
            raise InputError(
                f"{bin_path(prefix)} has token {least if least < 0 else most}, which the tokenizer of {vocab_size} "
                "pieces (data.vocab_size) does not have: give the tokenizer that the data was prepared with"
            )
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def _tokens(prefix: Path, index: Index) -> NDArray[np.integer]:
    # an empty file cannot be mapped
    return np.memmap(bin_path(prefix), mode="r", dtype=index.dtype) if index.tokens else np.zeros(0, index.dtype)
