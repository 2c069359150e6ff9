"""Decide how to read a file: by the ending of its name, or else by its first bytes."""

import codecs
import logging
import re
from enum import Enum
from pathlib import Path

from configs.errors import InputError
from data_pipeline.reading import COMPRESSIONS, iter_bytes
from data_pipeline.records import parse_json

logger = logging.getLogger(__name__)


class Kind(Enum):
    """How a file holds text."""

    TEXT = "text"
    RECORDS = "records"
    """One JSON object per line."""
    PARQUET = "parquet"


# In lower case. For an ending that is not listed, the first bytes decide.
_PROSE = (".txt", ".text", ".md", ".rst", ".tex")
_CODE = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".sh")
_ENDINGS = {
    **dict.fromkeys((*_PROSE, *_CODE), Kind.TEXT),
    ".jsonl": Kind.RECORDS,
    ".jsonlines": Kind.RECORDS,
    ".ndjson": Kind.RECORDS,
    ".json": Kind.RECORDS,
    ".parquet": Kind.PARQUET,
    ".pq": Kind.PARQUET,
}
_RECORDS_ADVICE = 'write one {"text": ...} per line in a .jsonl file'
_TABLE = f"is a table: {_RECORDS_ADVICE}, or a .parquet file with a column `text`"
_MARKUP = "is markup: extract its text, or end its name in .txt to train on the tags too"
_TOKENS = (
    "holds token ids: to train on prepared data, name its .bin as a source of its own, with its .idx beside it, and "
    "set data.tokenizer"
)
_REFUSED = {
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".html": _MARKUP,
    ".htm": _MARKUP,
    ".xhtml": _MARKUP,
    ".xml": _MARKUP,
    ".bin": _TOKENS,
    ".idx": _TOKENS,
}
_BINARY = "is {}, not text: extract its text first"
# First bytes of files that are refused whatever their name.
_FORMATS = (
    (rb"%PDF-\d", _BINARY.format("a PDF file")),
    (rb"%!PS-Adobe", _BINARY.format("a PostScript file")),
    (rb"\{\\rtf\d", _BINARY.format("an RTF file")),
    (rb"PK(?:\x03\x04|\x05\x06)", _BINARY.format("a zip archive (or an office document, which is one)")),
    (rb"(?s:.{257})ustar|7z\xbc\xaf|Rar!\x1a", _BINARY.format("an archive")),
    (rb"ARROW1\0", f"is an Arrow file: {_RECORDS_ADVICE}, or a .parquet file"),
    (rb"BZh[1-9]1AY&SY|\x04\x22\x4d\x18", "is compressed with bzip2 or lz4: compress it with gzip, xz or zstd"),
    (rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff", "is UTF-16 or UTF-32, not UTF-8: convert it to UTF-8"),
)
_PARQUET_BEGIN = b"PAR1"
_MARKUP_BEGIN = re.compile(rb"\s*<(?:!doctype|html|\?xml|mediawiki|svg)\b", re.IGNORECASE)
_STRING = rb'"(?:[^"\\]|\\.)*"'
_OBJECT_BEGIN = re.compile(rb"\s*\{\s*(?:" + _STRING + rb"\s*:|\})")
_ARRAY_BEGIN = re.compile(rb"\s*\[[\[\s]*(?:\{\s*" + _STRING + rb'\s*:|")')
_BLANK_BEGIN = re.compile(rb"\A(?:\s|" + codecs.BOM_UTF8 + rb")+")
_HEAD_BYTES = 1 << 16


def file_kind(path: Path) -> Kind:
    """Return how to read a file, compressed or not.

    Raises:
        InputError: it cannot be read, or it is neither text nor records nor parquet.
    """
    return _kind(path, _head(path))


def _kind(path: Path, head: bytes) -> Kind:
    ending = _ending(path)
    kind = _ENDINGS.get(ending)
    if kind is Kind.PARQUET or (kind is not Kind.TEXT and head.startswith(_PARQUET_BEGIN)):
        if path.suffix.lower() in COMPRESSIONS:
            raise InputError(f"data source {path} is a compressed parquet file: decompress it")
        return Kind.PARQUET
    if problem := _problem(head, kind, ending):
        raise InputError(f"data source {path} {problem}")
    return kind or (Kind.RECORDS if _OBJECT_BEGIN.match(head) else Kind.TEXT)


def check_kind(path: Path) -> bool:
    """Check that a file can be read, judging by its beginning; warn of records in a file named as text.

    Returns:
        Whether it holds anything but white space.
    Raises:
        InputError: see `file_kind`.
    """
    head = _head(path)
    if _kind(path, head) is Kind.TEXT and _begins_with_record(head) and b'"text"' in head:
        logger.warning(
            "data source %s begins with a JSON record but is read as plain text, as its name says: if it holds one "
            "record per line, end its name in .jsonl",
            path,
        )
    return bool(head)


def _problem(head: bytes, kind: Kind | None, ending: str) -> str | None:
    """Return why a file cannot be read, and what to do; None if its beginning shows no reason."""
    for begin, problem in _FORMATS:
        if re.match(begin, head):
            return problem
    if b"\0" in head:
        return f"holds NUL bytes (the first is byte {head.index(0)}): it is binary, or UTF-16 to convert to UTF-8"
    if ending in _REFUSED:
        return _REFUSED[ending]
    if kind is Kind.RECORDS and head.lstrip().startswith(b"["):
        return f"is one JSON array, not one record per line: {_RECORDS_ADVICE}, as `jq -c '.[]'` does"
    if kind is None and _MARKUP_BEGIN.match(head):
        return _MARKUP
    if kind is None and (_ARRAY_BEGIN.match(head) or (_OBJECT_BEGIN.match(head) and not _begins_with_record(head))):
        return f"begins like JSON, but not with one record per line: {_RECORDS_ADVICE}, or end its name in .txt"
    return None


def _begins_with_record(head: bytes) -> bool:
    """Return whether the first line that is not blank is a JSON object, or is too long to tell but begins like one."""
    if not _OBJECT_BEGIN.match(head):
        return False
    line, newline, _ = head.lstrip().partition(b"\n")
    if not newline and len(head) >= _HEAD_BYTES:
        return True
    try:
        return isinstance(parse_json(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _head(path: Path) -> bytes:
    """Return about `_HEAD_BYTES` bytes, decompressed, after blank lines and byte order marks at the beginning."""
    head = b""
    for block in iter_bytes(path, on_read=lambda _: None):
        head = _BLANK_BEGIN.sub(b"", head + block)
        if len(head) >= _HEAD_BYTES:
            break
    return head


def _ending(path: Path) -> str:
    """Return the ending of a name in lower case, without that of a compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ending
