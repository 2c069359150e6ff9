"""Find and read the results that `harness` keeps, and write them in words. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from configs.precisions import DEFAULT_PRECISION
from training.evaluation.kept import AtLeastOne, Kept, Step, read_measured

HARNESS_FOLDER = "harness"  # in the folder of a checkpoint's reports
HARNESS_RESULTS = "results"
_LARGE = 1e4  # from which on four digits say enough


class _KeptRow(Kept):
    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | int | None
    version: Any = None  # a task may have any
    fewshot: int | str | None
    samples: int | None
    limit: float | None
    max_length: AtLeastOne
    precision: str = DEFAULT_PRECISION
    date: str = ""


class _KeptEvaluation(Kept):
    versions: dict[str, str | None]


class _KeptHarness(Kept):
    checkpoint: str
    step: Step
    train_length: AtLeastOne
    evaluations: list[_KeptEvaluation]
    results: Annotated[list[_KeptRow], Field(min_length=1)]


def harness_files(folder: Path) -> list[Path]:
    """Return the results of all checkpoints.

    Args:
        folder: RUN_DIR/evaluation.
    """
    return sorted(folder.glob(f"*/{HARNESS_FOLDER}/{HARNESS_RESULTS}.json"))


def read_harness(path: Path) -> dict[str, Any]:
    """Return the results of a checkpoint.

    Raises:
        InputError: they cannot be read.
    """
    return read_measured(path, command="harness", form=_KeptHarness)


def metric_name(row: Mapping[str, Any]) -> str:
    """Return the metric of a row, with its filter if it has one, and an arrow to what is better."""
    better = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
    return f"{row['metric']}" + ("" if row["filter"] == "none" else f" ({row['filter']})") + better


def shown_value(value: float | None) -> str:
    """Return a value or its standard error; - if there is none."""
    if value is None:
        return "-"
    return f"{value:,.4f}" if abs(value) < _LARGE else f"{value:.4g}"


def shown_samples(row: Mapping[str, Any]) -> str:
    """Return how many questions a row is of, and whether they were limited."""
    count = "-" if row["samples"] is None else f"{row['samples']:,}"
    return count + ("" if row["limit"] is None else f" (--limit {row['limit']})")


def shown_version(row: Mapping[str, Any]) -> str:
    """Return the version of a row's task; - if it has none, or is of a version of trainshort that kept none."""
    version = row.get("version")
    return "-" if version is None else f"{version}"
