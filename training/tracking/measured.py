"""Log to MLflow what a command measured of a checkpoint: in the run of its training, and as a run below that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.observers import Status
from training.tracking.inputs import DatasetFacts, inputs_event
from training.tracking.tracker import MlflowTracker


@dataclass(frozen=True)
class TrackedMeasurement:
    """What a command measured of a checkpoint, as MLflow gets it.

    Attributes:
        kind: The command.
        name: Name of the run below that of the training.
        folder: Folder of the files, from that of the artifacts.
        values: Metrics of the training's run: their step, and values by name; None is left out.
        params: Parameters of the run below.
        points: Its metrics: name, value and step; one without a value is left out.
        datasets: What was read.
    """

    kind: str
    name: str
    folder: str
    values: Sequence[tuple[int, Mapping[str, float | None]]]
    params: Mapping[str, Any]
    points: Sequence[tuple[str, float | None, int]]
    datasets: Sequence[DatasetFacts] = ()


def track_measurement(
    tracker: MlflowTracker,
    measured: TrackedMeasurement,
    *,
    files: Sequence[Path],
    table: Mapping[str, Any] | None,
    began_ms: int,
    status: Status = "FINISHED",
) -> None:
    """Add a measurement to the MLflow run of the training, and end the tracker.

    Hold the lock of what `files` are written under: they must not be replaced meanwhile.

    Args:
        tracker: Attached to the MLflow run.
        measured: What was measured.
        files: What was written.
        table: Event that logs all results so far of its kind; None if nothing was written.
        began_ms: When it began, in milliseconds since the epoch.
        status: How it ended.
    """
    for step, values in measured.values:
        tracker.metrics(step, values)
    if measured.datasets:
        tracker.put(inputs_event(measured.datasets))
    for file in files:
        tracker.artifact(file, folder=measured.folder)
    if table is not None:
        tracker.put(table)
    tracker.nested(
        measured.name,
        kind=measured.kind,
        params=measured.params,
        points=[(name, value, step) for name, value, step in measured.points if value is not None],
        began_ms=began_ms,
        status=status,
    )
    tracker.close()
