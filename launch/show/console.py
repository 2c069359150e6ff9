"""Write JSON, text, lines and tables to standard output."""

import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from configs.terminal import printable
from launch.show.streams import write_output

# wider than any table
_NO_LIMIT = 100_000


def show_json(document: Any) -> None:
    """Write one JSON document in ASCII, so that every encoding of standard output can hold it."""
    write_output(json.dumps(document, indent=2, allow_nan=False) + "\n")


def show_text(text: str) -> bool:
    """Write text that a user wants as data: unchanged, as UTF-8 whatever the encoding of standard output.

    Bytes of a file name that is not UTF-8 are written as they are in the name. Return whether somebody may have read
    it.
    """
    return write_output(text.encode("utf-8", "surrogateescape"))


def show_lines(*lines: str) -> None:
    """Write lines of a message, without wrapping or styling; control characters in them are escaped."""
    write_output("".join(f"{printable(line)}\n" for line in lines))


def show_table(table: Table) -> None:
    """Write a table, as wide as its cells need: a path stays on one line, to be copied."""
    _show(table, width=None)


def show_folded(grid: Table) -> None:
    """Write a table whose cells fold at the terminal's width; in a file or a pipe they do not, unless COLUMNS says."""
    _show(grid, width=output_width())


def output_width() -> int | None:
    """Return the columns that output should fit into; None if any: in a file or a pipe, unless COLUMNS says."""
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console().width if limited else None


def fits(table: Table) -> bool:
    """Return whether a table is as narrow as the terminal; in a file or a pipe every table is, unless COLUMNS says."""
    width = output_width()
    return width is None or Console(width=_NO_LIMIT).measure(table).maximum - 1 <= width  # its right edge is a space


def _show(renderable: RenderableType, *, width: int | None) -> None:
    # Cells are data: without these, rich reads [red] as a colour and :smile: as an emoji.
    console = Console(width=width or _NO_LIMIT, markup=False, emoji=False, highlight=False)
    text = "".join(segment.text for segment in console.render(renderable))
    write_output(re.sub(" +$", "", text, flags=re.MULTILINE))  # rich pads each line


def wide_table(columns: Sequence[str], *, left: Collection[str] = ()) -> Table:
    """Return an empty table.

    Args:
        columns: Headings, in order.
        left: Columns of text, aligned to the left; the others hold numbers.
    """
    return _add_columns(Table(box=box.SIMPLE), columns, left=left)


def narrow_table(columns: Sequence[str], *, left: Collection[str] = ()) -> Table:
    """Return an empty table whose padding is small enough for many columns in 80 characters; see `wide_table`."""
    return _add_columns(Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False), columns, left=left)


def _add_columns(table: Table, columns: Sequence[str], *, left: Collection[str]) -> Table:
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
