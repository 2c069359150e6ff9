"""Write JSON, plain lines and tables to standard output."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show_json(document: Any) -> None:
    """Write one JSON document."""
    Console().print(json.dumps(document, indent=2, allow_nan=False), markup=False, highlight=False, soft_wrap=True)


def show_lines(*lines: str) -> None:
    """Write plain lines, without wrapping or styling."""
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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
