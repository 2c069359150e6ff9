"""Output of `compare`."""

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from configs.figures import byte_size, duration, perplexity_text, scaled
from configs.terminal import printable
from launch.show.console import narrow_table, output_width, show_folded, show_lines

if TYPE_CHECKING:
    from training.comparison.comparison import Comparison, TextResults
    from training.comparison.run import ComparedRun

_NOT_KNOWN = "-"
_LOSS = "{:.4f}".format
_LABEL_WIDTH = 16  # columns that a run's name may take more than its figures

Row = tuple[str, list[str]]
"""A name and a figure of each run; no figures in a heading."""


def show_comparison(comparison: "Comparison") -> None:
    """Write the figures of the runs, a column each, then the keys that differ, then what keeps them from comparing.

    Where the terminal is too narrow for all runs, the next ones follow below.
    """
    labels = [printable(run.label) for run in comparison.runs]
    sections = [figure_rows(comparison), *(list(perplexity_rows(comparison, text)) for text in comparison.texts)]
    for runs, widths in _blocks(labels, sections):
        table = narrow_table(("", *(labels[run] for run in runs)))
        table.columns[0].justify, table.columns[0].no_wrap = "left", True
        for column, width in zip(table.columns[1:], widths, strict=True):
            column.width, column.overflow = width, "fold"
        for section in sections:
            for name, cells in section:
                table.add_row(name, *(cells[run] for run in runs if cells))
            table.add_section()
        show_folded(table)
    if comparison.differences:
        show_lines("Keys that differ")
        show_folded(_differences(comparison, labels))
    show_lines(*(f"note: {note}" for note in comparison.notes))


def _blocks(labels: list[str], sections: list[list[Row]]) -> Iterator[tuple[range, list[int]]]:
    """Yield the runs of each table, as many as the output has room for, with the widths of their columns."""
    rows = [row for section in sections for row in section]
    widths = [
        max(min(len(label), _LABEL_WIDTH), *(len(cells[run]) for _, cells in rows if cells))
        for run, label in enumerate(labels)
    ]
    room = (output_width() or math.inf) - max(len(name) for name, _ in rows) - 2
    first, used = 0, 0
    for run, width in enumerate(widths):
        if run > first and used + width + 1 > room:
            yield range(first, run), widths[first:run]
            first, used = run, 0
        used += width + 1
    yield range(first, len(labels)), widths[first:]


def figure_rows(comparison: "Comparison") -> list[Row]:
    """Return the figures of the runs; those that no run has are left out."""
    runs = [run.values() for run in comparison.runs]

    def row(name: str, key: str, text: Callable[[Any], str]) -> Row:
        return name, [_NOT_KNOWN if run[key] is None else text(run[key]) for run in runs]

    def further_losses(key: str, name: Callable[[Any], str]) -> Iterator[Row]:
        for which in sorted({each for run in runs for each in run[key]}):
            yield name(which), [_LOSS(run[key][which]) if which in run[key] else _NOT_KNOWN for run in runs]

    rows: list[Row] = [
        row("position", "position", str),
        row("training length", "train_length", "{:,}".format),
        row("parameters", "parameters", scaled),
        ("steps", [_steps(run) for run in runs]),
        row("tokens", "tokens", scaled),
        row("training loss", "loss", _LOSS),
        row("  best", "best_loss", _LOSS),
        row("validation loss", "validation_loss", _LOSS),
        row("  best", "best_validation_loss", _LOSS),
        *further_losses("validation_by_length", "  at {:,} tokens".format),
        *further_losses("validation_by_source", lambda source: f"  of {printable(source)}"),
        row("tokens/s, median", "tokens_per_second", scaled),
        row("utilization, %", "model_flops_utilization", lambda share: f"{100 * share:.1f}"),
        row("peak memory", "memory_gb", lambda gigabytes: byte_size(gigabytes * 1e9)),
        row("time", "seconds", duration),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {_NOT_KNOWN}]


def perplexity_rows(comparison: "Comparison", text: "TextResults") -> Iterator[Row]:
    """Yield the perplexities of the runs on a text, below headings."""
    yield f"perplexity per {'word' if text.unit == 'word_perplexity' else 'token'}", []
    yield f"on {printable(text.text)}", []
    reports = [run.report if number in text.runs else None for number, run in enumerate(comparison.runs)]
    yield "at step", [_NOT_KNOWN if report is None else f"{report['step']:,}" for report in reports]
    protocol = None
    for key in text.keys:
        if text.protocol(key) != protocol:
            protocol = text.protocol(key)
            yield f"  {protocol}", []
        values = [text.value(number, key) for number in range(len(comparison.runs))]
        yield f"    {key[2]:,}", [_NOT_KNOWN if value is None else perplexity_text(value) for value in values]


def _differences(comparison: "Comparison", labels: list[str]) -> Table:
    table = narrow_table(("", *labels), left=("", *labels))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
    for key, cells in difference_rows(comparison):
        table.add_row(key, *cells)
    return table


def difference_rows(comparison: "Comparison") -> list[Row]:
    """Return the keys of the run files that differ, with a value of each run as text for one line."""
    return [(key, [*map(_setting, comparison.runs, values)]) for key, values in comparison.named_differences().items()]


def _setting(run: "ComparedRun", value: Any) -> str:
    if value is None and run.is_imported:  # its run file may say nothing of the key
        return _NOT_KNOWN
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _steps(run: dict[str, Any]) -> str:
    return f"{run['step']:,}" if run["step"] == run["steps"] else f"{run['step']:,} of {run['steps']:,}"
