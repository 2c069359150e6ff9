"""Read the bytes, text and lines of a file, plain or compressed, in blocks: a file is never whole in memory."""

import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from configs.errors import InputError

COMPRESSIONS = (".gz", ".zst", ".xz")
_BLOCK_BYTES = 1 << 16

OnRead = Callable[[int], None]
"""Called with the number of bytes read from disk (compressed, where the file is) since the last call."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def iter_text(path: Path, *, on_read: OnRead) -> Iterator[str]:
    """Yield the text of a UTF-8 file verbatim: line ends and a byte order mark stay as they are.

    Raises:
        InputError: cannot be read, is broken, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
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
        if text:
            yield text


def iter_lines(path: Path, *, on_read: OnRead) -> Iterator[bytes]:
    """Yield the lines of a file without their newline.

    Raises:
        InputError: cannot be read or is broken.
    """
    rest = b""
    for block in iter_bytes(path, on_read=on_read):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        yield rest


def iter_bytes(path: Path, *, on_read: OnRead) -> Iterator[bytes]:
    """Yield the bytes of a file in non-empty blocks, decompressed by the ending of its name.

    Raises:
        InputError: cannot be read, or the compressed data is broken or cut short.
    """
    blocks = _raw_blocks(path, on_read)
    if path.suffix in COMPRESSIONS:
        blocks = _decompressed(blocks, path)
    return (block for block in blocks if block)


def _raw_blocks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                on_read(len(block))
                yield block
    except OSError as error:
        raise InputError(f"data source {path} cannot be read ({error.strerror}): check the file") from None


def _decompressed(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    decompressor: _Decompressor | None = None
    try:
        for block in blocks:
            while block:
                if decompressor is None:
                    # gzip and xz files may be padded with zeros after a stream
                    block = block.lstrip(b"\0")
                    if not block:
                        break
                    decompressor = _new_decompressor(path.suffix)
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


def _new_decompressor(suffix: str) -> _Decompressor:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)  # 31: expect a gzip header
    if suffix == ".xz":
        return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor().decompressobj()
