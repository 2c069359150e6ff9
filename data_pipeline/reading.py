"""Read the bytes, text and lines of a file, plain or compressed, in blocks: a file is never whole in memory."""

import codecs
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

import zstandard

from configs.errors import InputError

COMPRESSIONS = (".gz", ".zst", ".xz")
BYTE_ORDER_MARK = "\ufeff"
LONGEST_LINE = 1 << 30  # bytes
_BLOCK_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31  # bytes; `zstd --ultra --long=31` refers this far back, the library's own limit is 128 MiB
# first bytes of a compressed file; a zst file may begin with a skippable frame
_COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}

OnRead = Callable[[int], None]
"""Called with the number of bytes read from disk (compressed, where the file is) since the last call."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def iter_text(path: Path, *, on_read: OnRead) -> Iterator[str]:
    """Yield the text of a UTF-8 file verbatim, line ends too, without the byte order mark that a file may begin with.

    Raises:
        InputError: the file cannot be read, is broken, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, begun = 0, False
    blocks = iter_bytes(path, on_read=on_read)
    while True:
        block = next(blocks, b"")
        # the decoder keeps the bytes of a character that is cut by the end of a block
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"data source {path} is not UTF-8 at byte {position - pending + error.start}: convert it to UTF-8"
            ) from None
        if not block:
            return
        position += len(block)
        if text and not begun:
            text, begun = text.removeprefix(BYTE_ORDER_MARK), True
        if text:
            yield text


def iter_lines(path: Path, *, on_read: OnRead, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """Yield the lines of a file without their newline.

    Args:
        path: The file.
        on_read: Called with the bytes read.
        longest: Bytes of the longest line that is accepted; a line must fit into memory several times.
    Raises:
        InputError: the file cannot be read, is broken, or has a longer line.
    """
    # a line is joined once: joining it block by block would take time quadratic in its length
    pieces: list[bytes] = []
    size = number = 0
    for block in iter_bytes(path, on_read=on_read):
        first, *others = block.split(b"\n")
        pieces.append(first)
        size += len(first)
        if size > longest:
            raise InputError(
                f"data source {path}, line {number + 1} is longer than {longest} bytes: write one record per line, or "
                "divide it"
            )
        if others:
            yield b"".join(pieces)
            yield from others[:-1]
            number += len(others)
            pieces = [others[-1]]
            size = len(others[-1])
    if rest := b"".join(pieces):
        yield rest


def iter_bytes(path: Path, *, on_read: OnRead) -> Iterator[bytes]:
    """Yield the bytes of a file in non-empty blocks, decompressed if it begins or ends its name like compressed data.

    Raises:
        InputError: the file cannot be read, or its compressed data is broken or cut short.
    """
    blocks = _raw_blocks(path, on_read)
    first = next(blocks, b"")
    blocks = chain([first], blocks)
    ending = path.suffix.lower()
    # the content decides, since names are often wrong; the name decides for a file that is broken
    compression = next((name for name, begin in _COMPRESSED.items() if begin.match(first)), ending)
    if compression in COMPRESSIONS:
        blocks = _decompressed(blocks, path, compression)
    return (block for block in blocks if block)


def _raw_blocks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                on_read(len(block))
                yield block
    except OSError as error:
        raise InputError(f"data source {path} cannot be read ({error.strerror}): check the file") from None


def _decompressed(blocks: Iterator[bytes], path: Path, compression: str) -> Iterator[bytes]:
    decompressor: _Decompressor | None = None
    try:
        for block in blocks:
            while block:
                if decompressor is None:
                    # gzip and xz files may be padded with zeros after a stream
                    block = block.lstrip(b"\0")
                    if not block:
                        break
                    decompressor = _new_decompressor(compression)
                yield decompressor.decompress(block)
                if not decompressor.eof:
                    break
                # a file may hold several streams, one after the other
                block, decompressor = decompressor.unused_data, None
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"data source {path} is broken ({reason}): copy or compress it again") from None
    if decompressor is not None:
        # checked here because zstandard's own reader ends without an error if a file is cut short
        raise InputError(f"data source {path} is cut short: copy or compress it again")


def _new_decompressor(compression: str) -> _Decompressor:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)  # 31: expect a gzip header
    if compression == ".xz":
        return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
