"""The text of a run's sources, as pieces of documents: text, jsonl and parquet files, and the docs of Python."""

import functools
import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import InputError
from configs.schema import Source
from data_pipeline.python_docs import LIMIT, python_docs
from data_pipeline.reading import COMPRESSIONS, Advance, lines, text_chunks

PYTHON_DOCS = "python-docs"
_SMALLEST_PIECE = 1 << 14
_LARGEST_PIECE = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class Chunk(NamedTuple):
    """Some characters of a document; the pieces of a document joined are the document, to the character."""

    text: str
    last: bool


def chunks(source: Source, *, separator: str | None, advance: Advance = lambda _: None) -> Iterator[Chunk]:
    """Yield the documents of a source in pieces, so that a file need not fit into memory.

    Args:
        source: A file, a glob or `python-docs`.
        separator: Cuts a text file into documents; None: a text file is one document.
        advance: Is told the bytes read.
    Raises:
        InputError: missing, empty, not UTF-8, a broken line, row or archive.
    """
    found = False
    for piece in _python_docs(advance) if source.path == PYTHON_DOCS else _files(source, separator, advance):
        found = found or not piece.text.isspace()
        yield piece
    if not found:
        raise InputError(f"data source {source.path} holds no text: remove it from data.sources or give another")


def source_files(path: str) -> tuple[Path, ...]:
    """Return the files that a path or a glob names, sorted.

    Raises:
        InputError: nothing is there, or a folder is.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return (file,)
    if file.is_dir():
        raise InputError(f"data source {path} is a folder: give its files, for example {path.rstrip('/')}/*.txt")
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(file), recursive=True))
        if files := tuple(name for name in found if name.is_file()):
            return files
        raise InputError(f"data source {path} matches no file: check the pattern")
    raise InputError(f"data source {path} does not exist: check the path, it is relative to {Path.cwd()}")


def source_size(path: str) -> int:
    """Return about how many bytes `pieces` will report to `advance`."""
    return LIMIT if path == PYTHON_DOCS else sum(file.stat().st_size for file in source_files(path))


def file_chunks(path: Path, *, separator: str | None, advance: Advance = lambda _: None) -> Iterator[Chunk]:
    """Yield the documents of one file in pieces.

    Raises:
        InputError: not UTF-8, a broken line, row or archive.
    """
    size = min(max(path.stat().st_size // 20, _SMALLEST_PIECE), _LARGEST_PIECE)
    kind = _kind(path)
    if kind == ".parquet":
        return (piece for text in _parquet_texts(path, advance) for piece in _cut([text], size=size))
    if kind in (".jsonl", ".ndjson"):
        return (piece for text in _jsonl_texts(path, advance) for piece in _cut([text], size=size))
    return _cut(text_chunks(path, advance=advance), size=size, separator=separator)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _files(source: Source, separator: str | None, advance: Advance) -> Iterator[Chunk]:
    for file in source_files(source.path):
        yield from file_chunks(file, separator=separator, advance=advance)


@functools.lru_cache(maxsize=1)
def _python_documents() -> tuple[str, ...]:
    # read twice, for the tokenizer's sample and for the tokens, and parsing takes seconds
    return tuple(python_docs())


def _python_docs(advance: Advance) -> Iterator[Chunk]:
    for text in _python_documents():
        advance(len(text))
        yield from _cut([text], size=_LARGEST_PIECE)


def _cut(chunks: Iterable[str], *, size: int, separator: str | None = None) -> Iterator[Chunk]:
    """Yield pieces of at most `size` characters, cut after a newline where there is one."""
    # a separator may stand across two chunks: its possible beginning is not given away
    kept_back = len(separator) - 1 if separator else 0
    buffer, begun = "", False
    for chunk in chunks:
        buffer += chunk
        if separator:
            *ended, buffer = buffer.split(separator)
            for text in ended:
                yield from _pieces_of(text, size, begun)
                begun = False
        while len(buffer) - kept_back > size:
            at = _cut_place(buffer, size)
            yield Chunk(buffer[:at], last=False)
            buffer, begun = buffer[at:], True
    yield from _pieces_of(buffer, size, begun)


def _pieces_of(text: str, size: int, begun: bool) -> Iterator[Chunk]:
    """Yield the rest of a document; an empty document gives nothing, an empty rest only the end."""
    while len(text) > size:
        at = _cut_place(text, size)
        yield Chunk(text[:at], last=False)
        text, begun = text[at:], True
    if text or begun:
        yield Chunk(text, last=True)


def _cut_place(text: str, size: int) -> int:
    for mark in "\n ":
        if (at := text.rfind(mark, size // 2, size)) >= 0:
            return at + 1
    return size


def _jsonl_texts(path: Path, advance: Advance) -> Iterator[str]:
    for number, line in enumerate(lines(path, advance=advance), start=1):
        if line.strip():
            yield _text(_json(line, path, number), f"data source {path}, line {number}")


def _json(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"data source {path}, line {number} is not UTF-8 at byte {error.start} of the line: convert it to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"data source {path}, line {number} is not JSON ({error.msg} at column {error.colno}): "
            'write one {"text": ...} a line'
        ) from None
    except RecursionError:
        raise InputError(f"data source {path}, line {number} is nested too deeply: remove it") from None


def _parquet_texts(path: Path, advance: Advance) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"data source {path} has no column `text` (it has {names}): rename its text column")
            share = path.stat().st_size // max(1, table.metadata.num_row_groups)
            for group in range(table.metadata.num_row_groups):
                for batch in table.iter_batches(256, row_groups=[group], columns=["text"], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield _text({"text": text}, f"data source {path}, row {row}")
                advance(share)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"data source {path} is broken after row {row} ({reason}): write or copy it again") from None


def _text(record: Any, where: str) -> str:
    if not isinstance(record, dict) or "text" not in record:
        raise InputError(f'{where} has no `text`: write one {{"text": ...}} a record')
    text = record["text"]
    if not isinstance(text, str):
        raise InputError(f"{where}: `text` must be a string, got {str(text)[:40]!r}: mend or remove the record")
    if found := _SURROGATE.search(text):
        raise InputError(
            f"{where}: `text` holds half a surrogate pair ({ascii(found[0])}), which is no character: mend it"
        )
    return text
