"""Read, write, check and count Megatron's .bin/.idx with numpy alone. Imports neither torch nor megatron.

Source: megatron.core.datasets.indexed_dataset, index version 1.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.prefixes import bin_path, idx_path

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# the format's codes for token types; 6 and 7 are floats
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SMALL_VOCABULARY = 65_500  # below it megatron-core stores tokens in 16 bits
_COUNTED_AT_ONCE = 1 << 24  # tokens
READ_AT_ONCE = 1 << 20  # tokens


@dataclass(frozen=True)
class Index:
    """The contents of an .idx: how its .bin is divided into sequences and documents."""

    dtype: np.dtype[np.integer]
    lengths: NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    documents: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def smallest_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Return the type that megatron-core stores tokens of a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)


def write_index(
    file: Path, *, dtype: np.dtype[np.integer], lengths: Sequence[int], document_ends: Sequence[int]
) -> None:
    """Write the index of a .bin whose sequences follow each other without a gap.

    Args:
        file: The .idx.
        dtype: Type of the tokens.
        lengths: Tokens of each sequence.
        document_ends: The number of sequences up to the end of each document.
    """
    (code,) = (code for code, each in _DTYPES.items() if each is dtype.type)
    sizes = np.array(lengths, np.int32)
    begins = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    with file.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), 1 + len(document_ends)))
        for numbers in (sizes, begins, np.zeros(1, np.int64), np.array(document_ends, np.int64)):
            out.write(numbers.tobytes())


def read_index(prefix: Path) -> Index:
    """Read the index of a .bin and check that the two files belong together.

    Raises:
        InputError: not an index, of another version or type, or one of the files is cut short.
    """
    file = idx_path(prefix)
    content = np.memmap(file, mode="r", dtype=np.uint8) if file.stat().st_size else np.zeros(0, np.uint8)
    if len(content) < _HEADER.size:
        raise InputError(f"{file} is cut short ({len(content)} bytes): copy it again")
    magic, version, code, sequences, boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise InputError(f"{file} is not a Megatron index of integer tokens, version 1: prepare the data again")
    if len(content) < _HEADER.size + 12 * sequences + 8 * boundaries:
        raise InputError(f"{file} is cut short ({len(content)} bytes): copy it again")
    # the layout: header, lengths int32 [sequences], byte offsets int64 [sequences], document boundaries int64
    lengths = np.frombuffer(content, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(content, np.int64, sequences, _HEADER.size + 4 * sequences)
    index = Index(np.dtype(_DTYPES[code]), lengths, documents=max(0, boundaries - 1))
    expected = index.tokens * index.dtype.itemsize
    actual = bin_path(prefix).stat().st_size
    if actual != expected:
        raise InputError(f"{bin_path(prefix)} has {actual} bytes where its index says {expected}: copy it again")
    # megatron-core allows any offsets, but we read sequences by their lengths alone: refuse gaps and overlaps
    ends = np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
    if not np.array_equal(offsets, ends - lengths.astype(np.int64) * index.dtype.itemsize):
        raise InputError(f"{file} has sequences that overlap or leave gaps: prepare the data again")
    return index


def document_numbers(prefix: Path) -> NDArray[np.int64]:
    """Return the number of the document that each sequence belongs to, [sequences].

    Raises:
        InputError: see `read_index`.
    """
    index = read_index(prefix)
    skipped = _HEADER.size + 12 * len(index.lengths)  # lengths and byte offsets
    content = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
    boundaries = np.frombuffer(content, np.int64, index.documents + 1 if index.documents else 0, skipped)
    # A sequence after the last boundary belongs to a document without an end.
    return np.searchsorted(boundaries[1:], np.arange(len(index.lengths)), side="right").astype(np.int64)


def iter_sequences(prefix: Path, *, sequences: NDArray[np.int64]) -> Iterator[NDArray[np.integer]]:
    """Yield the tokens of the given sequences, one after the other, in blocks of about a million tokens.

    Raises:
        InputError: see `read_index`.
    """
    index = read_index(prefix)
    ends = np.cumsum(index.lengths, dtype=np.int64)
    tokens = _tokens(prefix, index)
    blocks = np.cumsum(index.lengths[sequences], dtype=np.int64) // READ_AT_ONCE
    for chosen in np.split(sequences, np.flatnonzero(np.diff(blocks)) + 1):
        yield np.concatenate([tokens[:0], *(tokens[ends[i] - index.lengths[i] : ends[i]] for i in chosen)])


def histogram(prefix: Path, *, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each token occurs in a .bin, [vocab].

    Raises:
        InputError: see `read_index`; a token is negative, or not below the vocabulary size.
    """
    tokens = _tokens(prefix, read_index(prefix))
    counts = np.zeros(vocab_size, np.int64)
    # in blocks, since bincount converts its input to int64, and a .bin may be larger than memory
    for start in range(0, len(tokens), _COUNTED_AT_ONCE):
        block = tokens[start : start + _COUNTED_AT_ONCE]
        least, most = int(block.min()), int(block.max())
        if least < 0 or most >= vocab_size:
            raise InputError(
                f"{bin_path(prefix)} has token {least if least < 0 else most}, which the tokenizer of {vocab_size} "
                "pieces (data.vocab_size) does not have: give the tokenizer that the data was prepared with"
            )
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def _tokens(prefix: Path, index: Index) -> NDArray[np.integer]:
    # numpy cannot map an empty file
    return np.memmap(bin_path(prefix), mode="r", dtype=index.dtype) if index.tokens else np.zeros(0, index.dtype)
