"""Keep the report of `retrieval`: in the run folder, and in the MLflow run of the training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.files import try_to_lock
from training.observers import Status
from training.retrieval.kept import RETRIEVAL_FOLDER, retrieval_label
from training.retrieval.report import write_retrieval
from training.retrieval.shares import over_depths
from training.tracking.inputs import evaluation_input
from training.tracking.measured import TrackedMeasurement, track_measurement
from training.tracking.tables import retrieval_table, table_event
from training.tracking.tracker import MlflowTracker

_SCORES = ("recall", "choice", "log_probability", "margin")


def keep_retrieval(
    report: dict[str, Any],
    folder: Path,
    *,
    name: str,
    tracker: MlflowTracker | None,
    began_ms: int,
    status: Status = "FINISHED",
) -> Path:
    """Write the report of a checkpoint, and add it to the MLflow run of the training; return the Markdown.

    It replaces an earlier report on the same text. Only one that did not finish is written beside it, to `stopped/`.

    Args:
        report: The contents of the JSON.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
        tracker: Attached to the MLflow run of the training.
        began_ms: When the measurement began, in milliseconds since the epoch.
        status: How it ended.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    place, label = Path(name, RETRIEVAL_FOLDER), retrieval_label(report)
    with try_to_lock(folder / place):
        replaces = status == "FINISHED" or not (folder / place / f"{label}.json").exists()
        if not replaces:
            place /= "stopped"
        files: Sequence[Path] = ()
        try:
            files = write_retrieval(report, folder / place)
        finally:
            if tracker is not None:  # the work of minutes or hours, also where the disk does not take it
                path = f"retrieval/{label}.json"
                table = table_event(path, retrieval_table(folder, label=label)) if files else None
                measured = tracked_retrieval(report, checkpoint=name, folder=f"evaluation/{place}")
                if not replaces:  # the run of the training keeps the values of that report too
                    measured = replace(measured, values=[])
                track_measurement(tracker, measured, files=files, table=table, began_ms=began_ms, status=status)
    return files[1]


def tracked_retrieval(report: dict[str, Any], *, checkpoint: str, folder: str) -> TrackedMeasurement:
    """Return a report as MLflow gets it: means over the depths.

    Args:
        report: The contents of the JSON.
        checkpoint: Name of the checkpoint's folder.
        folder: Folder of the files, from that of the artifacts.
    """
    label, step, means = retrieval_label(report), report["step"], list(over_depths(report))
    values = {
        f"retrieval/{label}/{mean['task']}/{mean['length']}/{key}": mean[key] for mean in means for key in _SCORES
    }
    return TrackedMeasurement(
        kind="retrieval",
        name=f"retrieval {checkpoint}, {label}",
        folder=folder,
        values=[(step, values)],
        params={
            "checkpoint": checkpoint,
            "step": step,
            "text": label,
            "train_length": report["train_length"],
            "tasks": list(dict.fromkeys(mean["task"] for mean in means)),
            "lengths": sorted({mean["length"] for mean in means}),
            "prompts": sum(mean["prompts"] for mean in means),
            "seed": report["seed"],
            "precision": report["precision"],
        },
        # with the length as their step: MLflow draws them over it
        points=[(f"{mean['task']}/{key}", mean[key], mean["length"]) for mean in means for key in _SCORES],
        datasets=[evaluation_input(report)],
    )
