"""Which MLflow run belongs to a run folder: one, kept in RUN_DIR/mlflow_run.json."""

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
        run_id: MLflow's name of the run.
        uri: The server, without user and password; None for the sqlite file beside the run folder, so that the
            folders may be moved together.
    """

    run_id: str
    uri: str | None


def default_uri(run_dir: Path) -> str:
    """Return the URI of the sqlite file beside a run folder."""
    return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its files: beside a sqlite file, else where the server says (None)."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()


def without_password(uri: str) -> str:
    """Return a URI without the user and password that it may carry."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_record(run_dir: Path) -> RunRecord | None:
    """Return the run that a run folder names, or None where it names none that can be read."""
    try:
        found = json.loads((run_dir / "mlflow_run.json").read_text(encoding="utf-8"))
        return RunRecord(run_id=str(found["run_id"]), uri=found["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Write the run that a run folder names, whole or not at all."""
    with whole_file(run_dir / "mlflow_run.json") as temporary:
        temporary.write_text(json.dumps({"run_id": record.run_id, "uri": record.uri}) + "\n", encoding="utf-8")


def flatten(params: dict[str, Any]) -> dict[str, str]:
    """Return nested values as dotted keys: {"model": {"heads": 4}} gives {"model.heads": "4"}.

    Lists become JSON. MLflow refuses values over 6000 characters and keys over 250, so both are cut there.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}"[:250]: text for inner, text in flatten(value).items()})
        else:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else str(value)
            flat[str(key)[:250]] = text[:6000]
    return flat
