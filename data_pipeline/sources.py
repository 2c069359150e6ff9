"""Read the text of a run's sources in chunks of documents: text, jsonl and parquet files, and Python's own docs."""

import functools
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from configs.schema import Data, Source
from data_pipeline.kinds import Kind, check_kind, file_kind
from data_pipeline.prefixes import find_prefix
from data_pipeline.python_docs import PYTHON_DOCS_CHARACTERS, python_docs
from data_pipeline.reading import BYTE_ORDER_MARK, OnRead, iter_text
from data_pipeline.records import jsonl_texts, parquet_texts
from data_pipeline.tokenizer_files import find_tokenizer

PYTHON_DOCS = "python-docs"
_MIN_CHUNK, _MAX_CHUNK = 1 << 14, 1 << 20  # characters


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
        raise _no_text(source.path)


def check_source(path: str, *, most_files: int | None = None) -> None:
    """Check that a source exists and that its files can be read, judging by the beginning of each.

    Args:
        path: A file, a glob, a prepared .bin or `python-docs`.
        most_files: How many files to open; None for all. If some stay closed, the source is not reported as empty.
    Raises:
        InputError: see `source_files` and `file_kind`; or no file holds any text.
    """
    if path == PYTHON_DOCS or find_prefix(path):
        return
    files = source_files(path)
    filled = [check_kind(file) for file in files[:most_files]]
    if not any(filled) and len(filled) == len(files):
        raise _no_text(path)


def require_tokenizer(data: Data) -> None:
    """Check that `data.tokenizer` is set where it is needed, and is a file or a folder that holds one.

    Raises:
        InputError: it is not set, and a source is already tokenized; or there is no such file.
    """
    if data.tokenizer is None:
        if tokenized := [source.path for source in data.sources if find_prefix(source.path)]:
            raise InputError(
                f"data source {tokenized[0]} is already tokenized, but data.tokenizer is not set: "
                "give the tokenizer that it was prepared with"
            )
    elif not find_tokenizer(Path(data.tokenizer)).is_file():
        seen = "holds neither tokenizer.json nor tokenizer.model" if Path(data.tokenizer).is_dir() else "does not exist"
        raise InputError(f"data.tokenizer {data.tokenizer} {seen}: check the path, it is relative to {Path.cwd()}")


def source_files(path: str) -> tuple[Path, ...]:
    """Return the files that a path or a glob names, sorted; a file with several names once.

    Raises:
        InputError: no file matches, or something that is named or matched is not a file that can be read.
    """
    files = _matches(path) if glob.has_magic(path) and not os.path.lexists(path) else [Path(path)]
    # a link, a hard link or another spelling names the same file
    by_identity: dict[tuple[int, int], Path] = {}
    for file in files:
        state = _readable(file, path)
        by_identity.setdefault((state.st_dev, state.st_ino), file)
    return tuple(by_identity.values())


def _no_text(path: str) -> InputError:
    return InputError(f"data source {path} holds no text: remove it from data.sources or give another")


def _matches(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, sorted.

    Raises:
        InputError: it matches none, or a folder whose files it does not match, or leads through one it cannot list.
    """
    for parent in Path(pattern).parents:
        # glob skips a folder that it cannot list
        for folder in filter(os.path.isdir, glob.iglob(str(parent), recursive=True)):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(
                    f"data source {pattern} needs the folder {folder}, which cannot be listed: fix its permissions"
                )
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [match for match in matches if not os.path.isdir(match)]
    parts = Path(pattern).parts
    if parts[-1] != "**" and parts[-2:] != ("**", "*"):  # these match all files of a folder that they match
        searched = {folder for file in files for folder in file.parents}
        if left_out := sorted({*matches} - {*files} - searched):
            raise InputError(
                f"data source {pattern} matches the folder {left_out[0]} but no file in it: match files only, as in "
                "*.txt or **/*.txt, or give its files as another source"
            )
    if not files:
        raise InputError(f"data source {pattern} matches no file: check the pattern")
    return files


def _readable(file: Path, source: str) -> os.stat_result:
    """Return the state of a file that a source names or matches.

    Raises:
        InputError: it is missing, is not a file, or cannot be read.
    """
    name = f"data source {source}" + ("" if file == Path(source) else f" matches {file}, which")
    try:
        state = file.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if file.is_symlink():
            raise InputError(
                f"{name} is a link to {os.readlink(file)}, which does not exist: remove or fix it"
            ) from None
        raise InputError(f"{name} does not exist: check the path, it is relative to {Path.cwd()}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check the path") from None
    if stat.S_ISDIR(state.st_mode):
        raise InputError(f"{name} is a folder: give its files, for example {file}/{_pattern_of_files(file)}")
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{name} is a pipe, socket or device, and data is read more than once: copy it into a file")
    if not os.access(file, os.R_OK):
        raise InputError(f"{name} cannot be read (Permission denied): fix its permissions")
    return state


def _pattern_of_files(folder: Path) -> str:
    """Return a pattern that matches files of a folder, or of the folders in it, whose kind is known; else `*.txt`."""
    patterns = [f"{depth}*{ending}" for depth in ("", "*/") for ending in (".parquet", ".jsonl", ".jsonl.*", ".txt")]
    inside = glob.escape(str(folder))
    return next((pattern for pattern in patterns if any(glob.iglob(f"{inside}/{pattern}"))), "*.txt")


def source_size(path: str) -> int:
    """Return about how many bytes `source_chunks` will report to `on_read`."""
    if path == PYTHON_DOCS:
        return PYTHON_DOCS_CHARACTERS
    return sum(file.stat().st_size for file in source_files(path))


def file_chunks(path: Path, *, separator: str | None, on_read: OnRead = lambda _: None) -> Iterator[Chunk]:
    """Yield the documents of one file in chunks.

    Raises:
        InputError: neither text nor records nor parquet, not UTF-8, or a broken line, row or archive.
    """
    # a chunk becomes a sequence, the unit that is held out, so even a short file should have several
    size = min(max(path.stat().st_size // 20, _MIN_CHUNK), _MAX_CHUNK)
    kind = file_kind(path)
    if kind is Kind.TEXT:
        return cut_documents(iter_text(path, on_read=on_read), size=size, separator=separator)
    texts = parquet_texts(path, on_read) if kind is Kind.PARQUET else jsonl_texts(path, on_read)
    return (chunk for text in texts for chunk in cut_documents([text], size=size))


def cut_documents(texts: Iterable[str], *, size: int, separator: str | None = None) -> Iterator[Chunk]:
    """Yield a text in chunks of documents, each cut after a newline or a space where there is one.

    Args:
        texts: The text in consecutive parts of any length.
        size: Maximum characters of a chunk.
        separator: Ends a document and is dropped, with byte order marks behind it; a newline in it also matches CRLF.
            None: the text is one document. Empty documents are dropped.
    """
    # the newlines of a separator match both kinds of line ends, whichever kind the run file has
    lines = separator.replace("\r\n", "\n").split("\n") if separator else []
    pattern = re.compile("\r?\n".join(map(re.escape, lines)))
    # the buffer may end inside a separator: keep back enough characters to see it whole
    kept_back = max(0, len("\r\n".join(lines)) - 1)
    buffer, begun = "", False
    for text in texts:
        searched, start = max(0, len(buffer) - kept_back), 0
        buffer += text
        for match in pattern.finditer(buffer, searched) if separator else ():
            document = buffer[start : match.start()]
            yield from _rest_of_document(document if begun else _without_mark(document), size, begun)
            start, begun = match.end(), False
        if separator and not begun:
            buffer, start = _without_mark(buffer[start:]), 0
        while len(buffer) - start - kept_back > size:
            end = _cut_position(buffer, start, size)
            yield Chunk(buffer[start:end], ends_document=False)
            start, begun = end, True
        buffer = buffer[start:]
    yield from _rest_of_document(buffer, size, begun)


def _without_mark(document: str) -> str:
    # files that begin with a byte order mark may have been joined by the separator
    return document.lstrip(BYTE_ORDER_MARK)


def _rest_of_document(text: str, size: int, begun: bool) -> Iterator[Chunk]:
    """Yield the rest of a document; if a document has begun, an empty rest still marks its end."""
    start = 0
    while len(text) - start > size:
        end = _cut_position(text, start, size)
        yield Chunk(text[start:end], ends_document=False)
        start, begun = end, True
    if start < len(text) or begun:
        yield Chunk(text[start:], ends_document=True)


def _cut_position(text: str, start: int, size: int) -> int:
    # cut in the second half only, so that no chunk is much shorter than the others
    for mark in "\n ":
        if (at := text.rfind(mark, start + size // 2, start + size)) >= 0:
            return at + 1
    return start + size


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
