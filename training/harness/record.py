"""Keep the results of `harness`: in the run folder, and in the MLflow run of the training."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.files import try_to_lock
from training.evaluation.kept import other_precision
from training.harness.kept import HARNESS_FOLDER
from training.harness.report import write_results
from training.tracking.measured import TrackedMeasurement, track_measurement
from training.tracking.tables import harness_table, table_event
from training.tracking.tracker import MlflowTracker


def keep_results(
    report: Mapping[str, Any], folder: Path, *, tracker: MlflowTracker | None = None, began_ms: int = 0
) -> Path:
    """Add results to those kept of a checkpoint, and to the MLflow run of the training; return the Markdown.

    Args:
        report: What was measured now.
        folder: The checkpoint's folder in RUN_DIR/evaluation.
        tracker: Attached to the MLflow run of the training.
        began_ms: When the measurement began, in milliseconds since the epoch.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    with try_to_lock(folder / HARNESS_FOLDER):
        files: Sequence[Path] = ()
        try:
            files = write_results(report, folder)
        finally:
            if tracker is not None:  # the results of minutes or hours, also where the disk does not take them
                table = table_event("harness.json", harness_table(folder.parent)) if files else None
                measured = tracked_harness(report, checkpoint=folder.name)
                track_measurement(tracker, measured, files=files, table=table, began_ms=began_ms)
    return files[1]


def tracked_harness(report: Mapping[str, Any], *, checkpoint: str) -> TrackedMeasurement:
    """Return results as MLflow gets them.

    Args:
        report: What was measured.
        checkpoint: Name of the checkpoint's folder.
    """
    step, rows = report["step"], report["results"]
    values: dict[str, float | None] = {}
    for row in rows:
        name = _name_in_mlflow(row, train_length=report["train_length"])
        values |= {name: row["value"], f"{name}_stderr": row["stderr"]}
    settings = {key: rows[0][key] for key in ("limit", "max_length", "precision")} if rows else {}
    return TrackedMeasurement(
        kind="harness",
        name=f"harness {checkpoint}",
        folder=f"evaluation/{checkpoint}/{HARNESS_FOLDER}",
        values=[(step, {f"harness/{name}": value for name, value in values.items()})],
        params={
            "checkpoint": checkpoint,
            "step": step,
            "train_length": report["train_length"],
            "tasks": sorted({row["task"] for row in rows}),
            **settings,
            "lm_eval": report["evaluations"][-1]["versions"].get("lm_eval"),
        },
        points=[(name, value, step) for name, value in values.items()],
    )


def _name_in_mlflow(row: Mapping[str, Any], *, train_length: int) -> str:
    """Return the name of a result; one that was measured in another way than most has another name.

    Results of one name are a curve over the checkpoints. Those of a tenth of the questions, with five examples before
    each, or on texts longer than in training do not belong to it.
    """
    fewshot, limit, most = row["fewshot"], row["limit"], row["max_length"]
    ways = (
        f"{fewshot}-shot" if fewshot else None,
        None if limit is None else f"limit-{limit}",
        None if most == train_length else f"max-length-{most}",
        other_precision(row),
    )
    task = "-".join([row["task"], *(way for way in ways if way is not None)])
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}-{row['filter']}"
    # MLflow takes no other characters in a name
    return "/".join(re.sub(r"[^\w.-]", "_", part, flags=re.ASCII) for part in (task, metric))
