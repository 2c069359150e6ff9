"""The page of `trainshort report`: one HTML file that needs nothing else."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.errors import MachineError
from configs.files import whole_file
from configs.terminal import printable
from launch.show.comparison import Row, figure_rows, perplexity_rows, perplexity_text, setting_text
from training.own_file import check_own_file
from training.page.curves import perplexity_charts, training_charts
from training.page.details import read_details
from training.versions import installed_version

if TYPE_CHECKING:
    from training.comparison.comparison import Comparison

GENERATOR = "trainshort report"


@dataclass(frozen=True)
class Tile:
    """A figure of one run: its name, its value, and what more there is to say of it."""

    name: str
    value: str
    note: str = ""


def check_page_file(path: Path) -> None:
    """Refuse a path whose file is not a page that `write_page` wrote: it would be overwritten.

    Raises:
        InputError: it is another file, or has another ending than .html.
    """
    mark = f'<meta name="generator" content="{GENERATOR}">'.encode()
    check_own_file(path, what="page", form="HTML", ending=".html", is_ours=lambda head: mark in head)


def write_page(comparison: "Comparison", path: Path) -> None:
    """Write the page of one or several runs, whole or not at all; an existing page is replaced.

    Raises:
        MachineError: it cannot be written.
    """
    text = render_page(comparison)
    try:
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            # a name of a file that is not UTF-8 is shown with escapes
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise MachineError(f"page {path} cannot be written ({error.strerror}): give another --out") from None


def render_page(comparison: "Comparison") -> str:
    """Return the page of one or several runs."""
    # autoescape: names and texts come from files that anybody may have written
    templates = Environment(
        loader=PackageLoader("launch"),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    details = read_details(comparison)
    one = details[0] if len(details) == 1 else None
    figures = figure_rows(comparison)
    training = training_charts(comparison, marks=[start.step for start in one.starts[1:]] if one else [])
    return templates.get_template("page.html.j2").render(
        generator=GENERATOR,
        version=installed_version("trainshort") or "",
        written_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        title=one.label if one else f"{len(details)} runs",
        runs=details,
        figures=figures,
        tiles=[*_length_tiles(comparison), *_tiles(figures)] if one else [],
        perplexities=[row for text in comparison.texts for row in perplexity_rows(comparison, text)],
        differences=[
            (key, [setting_text(value) for value in values]) for key, values in comparison.differences.items()
        ],
        notes=comparison.notes,
        losses=[chart for chart in training if chart.is_large],
        training=[chart for chart in training if not chart.is_large],
        lengths=perplexity_charts(comparison),
    )


def _tiles(figures: list[Row]) -> Iterator[Tile]:
    """Yield the figures of one run; those that stand indented below another in a table become its note."""
    for place, (name, cells) in enumerate(figures):
        below = figures[place + 1 : place + 2]
        notes = [f"{inner.strip()} {values[0]}" for inner, values in below if inner.startswith(" ")]
        if not name.startswith(" "):
            yield Tile(name, cells[0], *notes)


def _length_tiles(comparison: "Comparison") -> Iterator[Tile]:
    """Yield the perplexity of one run at the longest length, and how many times its training length that is."""
    for text in comparison.texts:
        values = {key[2]: text.value(0, key) for key in text.keys if not key[1]}
        longest, trained = max(values, default=0), comparison.runs[0].config.data.sequence_length
        if (value := values.get(longest)) is None:
            continue
        at_trained = values.get(trained) if longest != trained else None
        compared = "" if at_trained is None else f", {perplexity_text(at_trained)} at {trained:,}"
        yield Tile(f"perplexity at {longest:,}", perplexity_text(value), f"{longest / trained:.3g} x trained{compared}")
