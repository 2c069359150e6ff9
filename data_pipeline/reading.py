"""Bytes, text and lines of a file, plain or compressed, in chunks: a file is never whole in memory."""

import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from configs.errors import InputError

COMPRESSIONS = (".gz", ".zst", ".xz")
_CHUNK = 1 << 16

Advance = Callable[[int], None]
"""Is told how many bytes of a file have been read since the last call."""


class _Engine(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def text_chunks(path: Path, *, advance: Advance) -> Iterator[str]:
    """Yield the text of a UTF-8 file verbatim: line ends and a byte order mark stay as they are.

    Raises:
        InputError: cannot be read, is broken, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    chunks = byte_chunks(path, advance=advance)
    while True:
        chunk = next(chunks, b"")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"data source {path} is not UTF-8 at byte {position - pending + error.start}: convert it to UTF-8"
            ) from None
        if not chunk:
            return
        position += len(chunk)
        if text:
            yield text


def lines(path: Path, *, advance: Advance) -> Iterator[bytes]:
    """Yield the lines of a file without their newline.

    Raises:
        InputError: cannot be read or is broken.
    """
    rest = b""
    for chunk in byte_chunks(path, advance=advance):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def byte_chunks(path: Path, *, advance: Advance) -> Iterator[bytes]:
    """Yield the bytes of a file in non-empty chunks, decompressed by the name's ending.

    Raises:
        InputError: cannot be read, or the compressed data is broken or cut short.
    """
    chunks = _raw_chunks(path, advance)
    if path.suffix in COMPRESSIONS:
        chunks = _decompressed(chunks, path)
    return (chunk for chunk in chunks if chunk)


def _raw_chunks(path: Path, advance: Advance) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                advance(len(chunk))
                yield chunk
    except OSError as error:
        raise InputError(f"data source {path} cannot be read ({error.strerror}): check the file") from None


def _decompressed(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    engine: _Engine | None = None
    try:
        for chunk in chunks:
            while chunk:
                if engine is None:
                    # gzip and xz files may be padded with zeros after a stream
                    chunk = chunk.lstrip(b"\0")
                    if not chunk:
                        break
                    engine = _engine(path.suffix)
                yield engine.decompress(chunk)
                if not engine.eof:
                    break
                # a file may hold several streams, one after the other
                chunk, engine = engine.unused_data, None
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"data source {path} is broken ({reason}): copy or compress it again") from None
    if engine is not None:
        # zstandard's own reader takes a file that was cut short for a whole one
        raise InputError(f"data source {path} is cut short: copy or compress it again")


def _engine(suffix: str) -> _Engine:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    if suffix == ".xz":
        return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor().decompressobj()
