"""Record of a run folder's one MLflow run: RUN_DIR/mlflow_run.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from configs.files import whole_file


@dataclass(frozen=True)
class RunRecord:
    """The MLflow run of a run folder.

    Attributes:
        run_id: MLflow's id of the run.
        uri: The server, without user and password. None for the sqlite file beside the run folder: the two may be
            moved together.
    """

    run_id: str
    uri: str | None


def default_uri(run_dir: Path) -> str:
    """Return the URI of the sqlite file beside a run folder."""
    return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment stores its artifacts: beside a sqlite file, else the server's choice (None)."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()


def without_password(uri: str) -> str:
    """Return a URI without its user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_record(run_dir: Path) -> RunRecord | None:
    """Return the record of a run folder, or None if there is none or it is broken."""
    try:
        document = json.loads((run_dir / "mlflow_run.json").read_text(encoding="utf-8"))
        return RunRecord(run_id=str(document["run_id"]), uri=document["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Write the record of a run folder atomically."""
    with whole_file(run_dir / "mlflow_run.json") as temporary:
        temporary.write_text(json.dumps({"run_id": record.run_id, "uri": record.uri}) + "\n", encoding="utf-8")


def flatten(params: dict[str, Any]) -> dict[str, str]:
    """Return nested values with dotted keys: {"model": {"heads": 4}} becomes {"model.heads": "4"}.

    Lists become JSON. Keys are cut at 250 characters and values at 6000, which are MLflow's limits.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}"[:250]: text for inner, text in flatten(value).items()})
        else:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else str(value)
            flat[str(key)[:250]] = text[:6000]
    return flat
