"""Record of a run folder's one MLflow run: RUN_DIR/mlflow_run.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from configs.files import whole_file
from configs.secrets import without_password


@dataclass(frozen=True)
class RunRecord:
    """The MLflow run of a run folder.

    Attributes:
        run_id: MLflow's id of the run.
        uri: The store, without user and password. None for the sqlite file beside the run folder: the two may be
            moved together.
        is_open: Whether a start has opened the run and not ended it: it is running, or it was killed.
    """

    run_id: str
    uri: str | None
    is_open: bool = False


def record_file(run_dir: Path) -> Path:
    """Return the file that holds the record of a run folder."""
    return run_dir / "mlflow_run.json"


def read_record(run_dir: Path) -> RunRecord | None:
    """Return the record of a run folder, or None if there is none or it is broken."""
    try:
        document = json.loads(record_file(run_dir).read_text(encoding="utf-8"))
        return RunRecord(str(document["run_id"]), document["uri"], is_open=bool(document.get("open")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Write the record of a run folder atomically."""
    uri = without_password(record.uri) if record.uri else None
    document = {"run_id": record.run_id, "uri": uri} | ({"open": True} if record.is_open else {})
    with whole_file(record_file(run_dir)) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
