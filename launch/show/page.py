"""The page of `trainshort report`: one HTML file that needs nothing else."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.errors import MachineError
from configs.figures import perplexity_text
from configs.files import whole_file
from configs.terminal import printable
from launch.show.comparison import Row, difference_rows, figure_rows
from training.evaluation.results import is_whole
from training.own_file import check_own_file
from training.page.curves import perplexity_charts, training_charts
from training.page.details import read_details
from training.page.measured import heat_maps, retrieved_means, task_scores
from training.versions import installed_version

if TYPE_CHECKING:
    from training.comparison.comparison import Comparison, TextResults

GENERATOR = "trainshort report"


@dataclass(frozen=True)
class Tile:
    """A figure of one run: its name, its value, and what more there is to say of it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class LengthTable:
    """Perplexities on one text.

    Attributes:
        facts: What was measured.
        lengths: Each length, and how many times the training length it is; the latter is empty if the runs differ.
        rows: Number of the run, what was measured, the step of the checkpoint, and a perplexity per length.
    """

    facts: str
    lengths: list[tuple[str, str]]
    rows: list[tuple[int, str, str, list[str]]]


def default_page(comparison: "Comparison") -> Path:
    """Return where a page is written if nothing else is said: that of one checkpoint is not that of its run."""
    if len(comparison.runs) > 1:
        return Path("comparison.html")
    (run,) = comparison.runs
    return run.run_dir / ("report.html" if run.path == run.run_dir else f"report-{run.checkpoint}.html")


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
        path.parent.mkdir(parents=True, exist_ok=True)
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
        tables=[_length_table(comparison, text) for text in comparison.texts],
        differences=difference_rows(comparison),
        notes=[note for note in comparison.notes if note not in comparison.unevaluated],
        losses=[chart for chart in training if chart.is_large],
        training=[chart for chart in training if not chart.is_large],
        lengths=perplexity_charts(comparison),
        heats=heat_maps(comparison),
        means=retrieved_means(comparison),
        scores=task_scores(comparison),
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
        values = {key[2]: text.value(0, key) for key, result in text.results[0].items() if is_whole(result)}
        longest, trained = max(values, default=0), comparison.runs[0].train_length
        if (value := values.get(longest)) is None:
            continue
        at_trained = values.get(trained) if longest != trained else None
        compared = "" if at_trained is None else f", {perplexity_text(at_trained)} at {trained:,}"
        yield Tile(f"perplexity at {longest:,}", perplexity_text(value), f"{longest / trained:.3g} x trained{compared}")


def _length_table(comparison: "Comparison", text: "TextResults") -> LengthTable:
    """Return the perplexities of the runs on a text: a row per protocol and run, a column per length."""
    several, runs = len(comparison.runs) > 1, comparison.runs
    protocols: dict[str, dict[int, tuple[str, int, int]]] = {}
    for key in text.keys:
        protocols.setdefault(text.protocol(key), {})[key[2]] = key
    lengths = sorted({key[2] for key in text.keys})
    trained = {runs[number].train_length for number in text.runs}
    times = [f"{length / min(trained):.3g} x" if len(trained) == 1 else "" for length in lengths]
    rows = []
    for protocol, keys in protocols.items():
        for number in text.runs:
            values = [text.value(number, keys[length]) if length in keys else None for length in lengths]
            names = ([runs[number].label] if several else []) + (
                [protocol] if len(protocols) > 1 or not several else []
            )
            report = runs[number].report or {}
            cells = ["-" if value is None else perplexity_text(value) for value in values]
            rows.append((number, ", ".join(names), f"{report['step']:,}", cells))
    unit = "word" if text.unit == "word_perplexity" else "token"
    facts = f"on {text.text}, per {unit}; {', '.join(protocols)}"
    return LengthTable(facts, [*zip((f"{length:,}" for length in lengths), times, strict=True)], rows)
