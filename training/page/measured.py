"""What `harness` and `retrieval` measured of the runs of a page. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.paths import evaluation_folder
from training.comparison.comparison import Comparison
from training.comparison.run import ComparedRun
from training.evaluation.kept import other_precision, text_name
from training.harness.kept import (
    harness_files,
    metric_name,
    read_harness,
    shown_samples,
    shown_value,
    shown_version,
)
from training.retrieval.kept import read_retrieval, retrieval_files
from training.retrieval.shares import over_depths, share_with_interval

_Report = dict[str, Any]
# of each score its name in a report, and what it means
_SCORES = (("recall", "recall: generated"), ("choice", "choice: likeliest of ten"))
# columns that say how all was measured, if they hold one value
_SETTINGS = ("at step", "text", "few-shot", "longest input")


@dataclass(frozen=True)
class MeasuredTable:
    """A table whose rows are of several runs.

    Attributes:
        facts: What holds for all rows.
        headings: Headings of the columns.
        words: How many columns, the first ones, hold words and not numbers.
        rows: Number of the run, and the cells.
    """

    facts: str
    headings: tuple[str, ...]
    words: int
    rows: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class HeatCell:
    """A share from 0 to 1, as text, and what more there is to say of it."""

    share: float
    text: str
    title: str


@dataclass(frozen=True)
class HeatScore:
    """What one score means, and its rows: a depth in words, and a cell per length, None where nothing was measured."""

    meaning: str
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]


@dataclass(frozen=True)
class HeatMap:
    """What one run retrieved of a task, by depth and length.

    Attributes:
        run: Number of the run.
        task: Name of the task.
        facts: The run, text and step.
        lengths: Each length, and how many times the training length it is.
        trained: How many of them, the first ones, are not beyond the training length.
        scores: The scores, by depth and length.
    """

    run: int
    task: str
    facts: str
    lengths: tuple[tuple[str, str], ...]
    trained: int
    scores: tuple[HeatScore, ...]

    @property
    def has_longer(self) -> bool:
        """Whether lengths on both sides of the training length were measured."""
        return 0 < self.trained < len(self.lengths)


def task_scores(comparison: Comparison) -> MeasuredTable | None:
    """Return the results of tasks of the lm-evaluation-harness, equal ones of the runs together; None if none has."""
    reports = [*_reports(comparison, harness_files, read_harness)]
    if not reports:
        return None
    several = len(comparison.runs) > 1
    groups: dict[tuple[Any, ...], list[tuple[int, _Report, _Report]]] = {}
    for number, report in reports:
        for row in report["results"]:
            key = tuple(row[name] for name in ("task", "metric", "filter", "fewshot", "limit"))
            groups.setdefault(key, []).append((number, report, row))
    rows = []
    for number, report, row in (each for group in groups.values() for each in group):
        label = [comparison.runs[number].label] if several else []
        fewshot = "-" if row["fewshot"] is None else f"{row['fewshot']}"
        longest = " in ".join(filter(None, [f"{row['max_length']:,}", other_precision(row)]))
        cells = (shown_value(row["value"]), shown_value(row["stderr"]), shown_version(row), fewshot)
        last = (shown_samples(row), longest, f"{report['step']:,}")
        rows.append((number, (row["task"], metric_name(row), *label, *cells, *last)))
    versions = {made["versions"].get("lm_eval") for _, report in reports for made in report["evaluations"]} - {None}
    by = f"by lm_eval {', '.join(sorted(versions))}; " if versions else ""
    headings = ("value", "stderr", "version", "few-shot", "samples", "longest input", "at step")
    names = ("task", "metric", *(["run"] if several else []))
    facts = f"{by}version: the task's own; a context beyond the longest input loses its beginning"
    return _without_constants(MeasuredTable(facts, (*names, *headings), len(names), tuple(rows)))


def retrieved_means(comparison: Comparison) -> MeasuredTable | None:
    """Return what the runs retrieved, means over the depths, equal tasks and lengths together; None if none has."""
    reports = [*_reports(comparison, retrieval_files, read_retrieval)]
    if not reports:
        return None
    several = len(comparison.runs) > 1
    groups: dict[str, dict[int, list[tuple[int, tuple[str, ...]]]]] = {}
    for number, report in reports:
        label = [comparison.runs[number].label] if several else []
        for mean in over_depths(report):
            names = (mean["task"], *label, _text_of(report))
            scores = (share_with_interval(mean, key) for key, _ in _SCORES)
            likely = (f"{mean['log_probability']:.2f}", f"{mean['margin']:+.2f}", f"{mean['prompts']:,}")
            length = (f"{mean['length']:,}", _times(mean["length"], report))
            row = (number, (*names, *length, *scores, *likely, f"{report['step']:,}"))
            groups.setdefault(mean["task"], {}).setdefault(mean["length"], []).append(row)
    rows = tuple(row for lengths in groups.values() for length in sorted(lengths) for row in lengths[length])
    words = ("task", *(["run"] if several else []), "text")
    headings = ("length", "x trained", "recall", "choice", "nats", "margin", "prompts", "at step")
    nats = "nats: log-probability of a number, margin: how much it is above that of wrong ones"
    facts = f"means over the depths, in brackets 95 % intervals; {nats}"
    return _without_constants(MeasuredTable(facts, (*words, *headings), len(words), rows))


def heat_maps(comparison: Comparison) -> list[HeatMap]:
    """Return what the runs retrieved, a map for each task, run and text."""
    several, maps = len(comparison.runs) > 1, []
    for number, report in _reports(comparison, retrieval_files, read_retrieval):
        facts = [comparison.runs[number].label] if several else []
        facts += [f"on {_text_of(report)}", f"at step {report['step']:,}"]
        tasks = dict.fromkeys(result["task"] for result in report["results"])
        maps += [_heat_map(report, task, run=number, facts=", ".join(facts)) for task in tasks]
    return sorted(maps, key=lambda each: [*dict.fromkeys(each.task for each in maps)].index(each.task))


def _without_constants(table: MeasuredTable) -> MeasuredTable:
    """Return a table without the columns of its settings that have one value in all rows, which the facts say."""
    columns = zip(*(cells for _, cells in table.rows), strict=True)
    only = {heading: {*column} for heading, column in zip(table.headings, columns, strict=True)}
    constant = {heading: min(only[heading]) for heading in _SETTINGS if len(only.get(heading, ())) == 1}
    kept = [place for place, heading in enumerate(table.headings) if heading not in constant]
    return MeasuredTable(
        facts="; ".join([*(f"{heading} {value}" for heading, value in constant.items()), table.facts]),
        headings=tuple(table.headings[place] for place in kept),
        words=sum(place < table.words for place in kept),
        rows=tuple((number, tuple(cells[place] for place in kept)) for number, cells in table.rows),
    )


def _heat_map(report: _Report, task: str, *, run: int, facts: str) -> HeatMap:
    results = {(each["length"], each["depth"]): each for each in report["results"] if each["task"] == task}
    lengths, depths = sorted({length for length, _ in results}), list(dict.fromkeys(depth for _, depth in results))
    names = ["any" if depth is None else f"{100 * depth:.0f} %" for depth in depths]
    scores = []
    for key, meaning in _SCORES:
        cells = [tuple(_heat_cell(results.get((length, depth)), key) for length in lengths) for depth in depths]
        scores.append(HeatScore(meaning, tuple(zip(names, cells, strict=True))))
    return HeatMap(
        run=run,
        task=task,
        facts=facts,
        lengths=tuple((f"{length:,}", f"{_times(length, report)} x") for length in lengths),
        trained=sum(length <= report["train_length"] for length in lengths),
        scores=tuple(scores),
    )


def _heat_cell(result: _Report | None, key: str) -> HeatCell | None:
    if result is None:
        return None
    title = f"{share_with_interval(result, key)} of {result['prompts']:,} prompts"
    return HeatCell(result[key], f"{100 * result[key]:.0f}", title)


def _times(length: int, report: _Report) -> str:
    return f"{length / report['train_length']:.3g}"


def _text_of(report: _Report) -> str:
    scale, precision = report.get("scale"), other_precision(report)
    name = text_name(report) if scale is None else f"{text_name(report)}, {scale}"
    return name if precision is None else f"{name} in {precision}"


def _reports(
    comparison: Comparison, find: Callable[[Path], Sequence[Path]], read: Callable[[Path], _Report]
) -> Iterator[tuple[int, _Report]]:
    """Yield what was measured of each run, with the run's number.

    It is that of the compared checkpoint. A run folder whose newest checkpoint has none shows the latest there is.
    """
    for number, run in enumerate(comparison.runs):
        for file in _files(run, find(evaluation_folder(run.run_dir))):
            yield number, read(file)


def _files(run: ComparedRun, files: Sequence[Path]) -> list[Path]:
    by_checkpoint: dict[str, list[Path]] = {}
    for file in files:
        by_checkpoint.setdefault(file.parent.parent.name, []).append(file)
    is_given = run.path != run.run_dir
    name = run.checkpoint if run.checkpoint in by_checkpoint or is_given else max(by_checkpoint, default=None)
    return [] if name is None else by_checkpoint.get(name, [])
