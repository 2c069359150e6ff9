"""What a command leaves for MLflow in the spool of a run folder, without a store."""

from pathlib import Path
from typing import Any

from training.tracking.record import RunRecord, write_record
from training.tracking.spool import SpoolPosition, read_events, spool_files
from training.tracking.tracker import MlflowTracker, attach


def begin_mlflow_run(run_dir: Path) -> None:
    """Make a run folder one whose training has an MLflow run; the store is never asked."""
    write_record(run_dir, RunRecord("abc", "http://127.0.0.1:9"))


def attach_offline(run_dir: Path, **_: object) -> MlflowTracker | None:
    """Attach to a run folder's MLflow run, and only spool."""
    return attach(run_dir, uri=None, offline=True)


def spooled(run_dir: Path, *, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind, oldest first."""
    files = spool_files(run_dir)
    return [event for file in files for event, _ in read_events(file, SpoolPosition()) if event["kind"] == kind]
