"""What the harness measured of a checkpoint: rows for programs, a table to read. Imports no torch."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import move_aside, write_whole
from training.evaluation.folder import failed_write_keeps
from training.evaluation.markdown import made_by, verbatim
from training.harness.kept import (
    HARNESS_FOLDER,
    HARNESS_RESULTS,
    metric_name,
    read_harness,
    shown_samples,
    shown_value,
    shown_version,
)

logger = logging.getLogger(__name__)

# Two results with equal values of these are of one measurement: the newer one replaces the other.
_KEY = ("task", "metric", "filter", "fewshot", "limit", "max_length", "precision")


def result_rows(results: Mapping[str, Any], **facts: object) -> list[dict[str, Any]]:
    """Return one row per task or group, filter and metric.

    Args:
        results: What lm_eval's `evaluate` returns.
        facts: What all rows have in common.
    Raises:
        InputError: there are no results.
    """
    rows = [*_rows(results, facts)]
    if not rows:
        tasks = ", ".join(results["results"])
        raise InputError(f"{tasks} gave no number, so there is nothing to keep: use tasks whose metrics are numbers")
    return rows


def _rows(results: Mapping[str, Any], facts: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            yield {
                "task": task,
                "metric": metric,
                "filter": name,
                "value": _finite(value),
                "stderr": _finite(values.get(f"{metric}_stderr,{name}")),
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                "version": results["versions"].get(task),
                "fewshot": results["n-shot"].get(task),
                "samples": values.get("sample_len"),
                **facts,
            }


def write_results(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Add results to those kept of a checkpoint, each file whole or not at all; return the JSON and the Markdown.

    Hold the lock of the folder that they are written to: the files must be of the same results.

    Args:
        report: What was measured now.
        folder: The checkpoint's folder in RUN_DIR/evaluation.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    place = folder / HARNESS_FOLDER
    table, document = place / f"{HARNESS_RESULTS}.md", place / f"{HARNESS_RESULTS}.json"
    with failed_write_keeps(dict(report), folder=place):
        place.mkdir(parents=True, exist_ok=True)
        merged = _with_earlier(report, document)
        write_whole(table, results_page(merged))
        write_whole(document, json.dumps(merged, indent=2) + "\n")  # last: where it is, the table is too
    return document, table


def results_page(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [
        "# Tasks of the lm-evaluation-harness",
        "",
        f"- checkpoint: {verbatim(report['checkpoint'])} (step {report['step']:,})",
        f"- trained at {report['train_length']:,} tokens",
        *(f"- evaluated {line}" for line in map(_evaluation, report["evaluations"])),
        "",
        "| task | version | metric | value | stderr | few-shot | samples | longest input | precision | evaluated |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in map(_page_cells, report["results"])),
        "",
        "`longest input`: tokens that the model was given at most; a longer context lost its beginning.",
        "",
    ]
    return "\n".join(lines)


def _evaluation(made: Mapping[str, Any]) -> str:
    return made_by(made, note=f"; {made['cut']:,} contexts were cut" if made["cut"] else "")


def _page_cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"`{row['task']}`"
    yield shown_version(row)
    yield metric_name(row)
    yield shown_value(row["value"])
    yield shown_value(row["stderr"])
    yield "-" if row["fewshot"] is None else str(row["fewshot"])
    yield shown_samples(row)
    yield f"{row['max_length']:,}"
    yield str(row["precision"])
    yield str(row["date"])


def _with_earlier(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a report with the results kept at a path; those of other weights are moved aside there."""
    if not path.exists():
        return dict(report)
    try:
        earlier = read_harness(path)
        if earlier["weights_sha256"] != report["weights_sha256"]:
            raise ValueError("other weights")
        rows = {tuple(row[key] for key in _KEY): row for row in (*earlier["results"], *report["results"])}
        made = {each["date"]: each for each in (*earlier["evaluations"], *report["evaluations"])}
    except (InputError, ValueError, KeyError):  # broken too
        aside = move_aside(path, date=report["evaluations"][0]["date"])
        logger.warning("%s was broken or of other weights: it is now %s", path, aside.name)
        return dict(report)
    dates = {row["date"] for row in rows.values()}
    results = [rows[key] for key in sorted(rows, key=str)]
    return {**report, "evaluations": [made[date] for date in sorted(made) if date in dates], "results": results}


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
