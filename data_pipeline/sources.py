"""Read the text of a run's sources in chunks of documents: text, jsonl and parquet files, and Python's own docs."""

import functools
import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import InputError
from configs.schema import Source
from data_pipeline.python_docs import PYTHON_DOCS_CHARACTERS, python_docs
from data_pipeline.reading import COMPRESSIONS, OnRead, iter_lines, iter_text

PYTHON_DOCS = "python-docs"
_MIN_CHUNK, _MAX_CHUNK = 1 << 14, 1 << 20  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")


class Chunk(NamedTuple):
    """A part of a document. Joining a document's chunks gives back its exact text."""

    text: str
    ends_document: bool


def source_chunks(source: Source, *, separator: str | None, on_read: OnRead = lambda _: None) -> Iterator[Chunk]:
    """Yield the documents of a source in chunks, so that no file must fit into memory.

    Args:
        source: A file, a glob or `python-docs`.
        separator: Splits a text file into documents; None: a text file is one document.
        on_read: Called with the bytes read.
    Raises:
        InputError: missing, empty, not UTF-8, or a broken line, row or archive.
    """
    has_text = False
    for chunk in _python_docs(on_read) if source.path == PYTHON_DOCS else _files(source, separator, on_read):
        has_text = has_text or not chunk.text.isspace()
        yield chunk
    if not has_text:
        raise InputError(f"data source {source.path} holds no text: remove it from data.sources or give another")


def source_files(path: str) -> tuple[Path, ...]:
    """Return the files that a path or a glob names, sorted.

    Raises:
        InputError: no file matches, or the path is a folder.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return (file,)
    if file.is_dir():
        raise InputError(f"data source {path} is a folder: give its files, for example {path.rstrip('/')}/*.txt")
    if glob.has_magic(path):
        matches = sorted(Path(name) for name in glob.glob(str(file), recursive=True))
        if files := tuple(match for match in matches if match.is_file()):
            return files
        raise InputError(f"data source {path} matches no file: check the pattern")
    raise InputError(f"data source {path} does not exist: check the path, it is relative to {Path.cwd()}")


def source_size(path: str) -> int:
    """Return about how many bytes `source_chunks` will report to `on_read`."""
    if path == PYTHON_DOCS:
        return PYTHON_DOCS_CHARACTERS
    return sum(file.stat().st_size for file in source_files(path))


def file_chunks(path: Path, *, separator: str | None, on_read: OnRead = lambda _: None) -> Iterator[Chunk]:
    """Yield the documents of one file in chunks.

    Raises:
        InputError: not UTF-8, or a broken line, row or archive.
    """
    # a chunk becomes a sequence, the unit that is held out, so even a short file should have several
    size = min(max(path.stat().st_size // 20, _MIN_CHUNK), _MAX_CHUNK)
    kind = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    if kind == ".parquet":
        return (chunk for text in _parquet_texts(path, on_read) for chunk in cut_documents([text], size=size))
    if kind in (".jsonl", ".ndjson"):
        return (chunk for text in _jsonl_texts(path, on_read) for chunk in cut_documents([text], size=size))
    return cut_documents(iter_text(path, on_read=on_read), size=size, separator=separator)


def cut_documents(texts: Iterable[str], *, size: int, separator: str | None = None) -> Iterator[Chunk]:
    """Yield a text in chunks of documents, each cut after a newline or a space where there is one.

    Args:
        texts: The text in consecutive parts of any length.
        size: Maximum characters of a chunk.
        separator: Ends a document and is dropped; None: the text is one document. Empty documents are dropped.
    """
    # the buffer may end inside a separator: keep back enough characters to see it whole
    kept_back = len(separator) - 1 if separator else 0
    buffer, begun = "", False
    for text in texts:
        buffer += text
        if separator:
            *ended, buffer = buffer.split(separator)
            for document in ended:
                yield from _rest_of_document(document, size, begun)
                begun = False
        while len(buffer) - kept_back > size:
            at = _cut_position(buffer, size)
            yield Chunk(buffer[:at], ends_document=False)
            buffer, begun = buffer[at:], True
    yield from _rest_of_document(buffer, size, begun)


def _rest_of_document(text: str, size: int, begun: bool) -> Iterator[Chunk]:
    """Yield the rest of a document; if a document has begun, an empty rest still marks its end."""
    while len(text) > size:
        at = _cut_position(text, size)
        yield Chunk(text[:at], ends_document=False)
        text, begun = text[at:], True
    if text or begun:
        yield Chunk(text, ends_document=True)


def _cut_position(text: str, size: int) -> int:
    # cut in the second half only, so that no chunk is much shorter than the others
    for mark in "\n ":
        if (at := text.rfind(mark, size // 2, size)) >= 0:
            return at + 1
    return size


def _files(source: Source, separator: str | None, on_read: OnRead) -> Iterator[Chunk]:
    for file in source_files(source.path):
        yield from file_chunks(file, separator=separator, on_read=on_read)


@functools.lru_cache(maxsize=1)
def _python_documents() -> tuple[str, ...]:
    # cached: read twice, to train the tokenizer and to write the tokens, and parsing takes seconds
    return tuple(python_docs())


def _python_docs(on_read: OnRead) -> Iterator[Chunk]:
    for text in _python_documents():
        on_read(len(text))
        yield from cut_documents([text], size=_MAX_CHUNK)


def _jsonl_texts(path: Path, on_read: OnRead) -> Iterator[str]:
    for number, line in enumerate(iter_lines(path, on_read=on_read), start=1):
        if line.strip():
            yield _text(_json(line, path, number), f"data source {path}, line {number}")


def _json(line: bytes, path: Path, number: int) -> Any:
    try:
        # only the first line may begin with a byte order mark
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"data source {path}, line {number} is not UTF-8 at byte {error.start} of the line: convert it to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"data source {path}, line {number} is not JSON ({error.msg} at column {error.colno}): "
            'write one {"text": ...} per line'
        ) from None
    except RecursionError:
        raise InputError(f"data source {path}, line {number} is nested too deeply: remove it") from None


def _parquet_texts(path: Path, on_read: OnRead) -> Iterator[str]:
    # not at the top: pyarrow is slow to import, and most runs read no parquet
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"data source {path} has no column `text` (it has {names}): rename its text column")
            group_bytes = path.stat().st_size // max(1, table.metadata.num_row_groups)
            for group in range(table.metadata.num_row_groups):
                for batch in table.iter_batches(256, row_groups=[group], columns=["text"], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield _text({"text": text}, f"data source {path}, row {row}")
                on_read(group_bytes)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"data source {path} is broken after row {row} ({reason}): write or copy it again") from None


def _text(record: Any, where: str) -> str:
    if not isinstance(record, dict) or "text" not in record:
        raise InputError(f'{where} has no `text`: write one {{"text": ...}} per record')
    text = record["text"]
    if not isinstance(text, str):
        raise InputError(f"{where}: `text` must be a string, got {str(text)[:40]!r}: fix or remove the record")
    if surrogate := _SURROGATE.search(text):
        raise InputError(
            f"{where}: `text` holds half a surrogate pair ({ascii(surrogate[0])}), which is not a character: "
            "fix or remove the record"
        )
    return text
