"""Read the texts of files of records: one JSON object per line, or the rows of a parquet file."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import InputError, in_brief
from data_pipeline.reading import OnRead, iter_lines

_SURROGATE = re.compile("[\ud800-\udfff]")
# Python refuses to convert numbers of more than 4,300 digits. They are not used, and a message shows 40 characters.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:40]))


def parse_json(line: str) -> Any:
    """Return the value of a line; whole numbers are cut after 40 digits.

    Raises:
        json.JSONDecodeError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(line)


def jsonl_texts(path: Path, on_read: OnRead) -> Iterator[str]:
    """Yield the `text` of each line; blank lines are skipped.

    Raises:
        InputError: the file cannot be read or is broken, or a line is not a JSON object with a `text`.
    """
    for number, line in enumerate(iter_lines(path, on_read=on_read), start=1):
        # at any line: files that begin with a byte order mark may have been joined
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield _text(_json(line, path, number), f"data source {path}, line {number}")


def parquet_texts(path: Path, on_read: OnRead) -> Iterator[str]:
    """Yield the column `text`, row by row.

    Raises:
        InputError: the file cannot be read, is broken or has no such column, or a row is not a string.
    """
    # not at the top: pyarrow is slow to import, and most runs read no parquet
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        # an open file: pyarrow takes no path that is not UTF-8
        with path.open("rb") as file, ParquetFile(file) as table:
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
        reason = in_brief(str(error), most=120)
        raise InputError(f"data source {path} is broken after row {row} ({reason}): write or copy it again") from None


def _json(line: bytes, path: Path, number: int) -> Any:
    try:
        return parse_json(line.decode())
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
