"""One MLflow run, through MLflow's client: the only module that imports mlflow.

Everything here may block for seconds, and raises what MLflow, its database driver or the network raise;
`training.tracking.tracker` keeps both away from training.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.tracking.record import RunRecord, artifact_location, read_record, without_password, write_record

# MLflow's own limits of one request
_METRICS_A_BATCH = 1000
_PARAMS_A_BATCH = 100
_LOGGED_STEPS = "trainshort.logged_steps"


@dataclass(frozen=True)
class Measured:
    """The values of one step, and when they were measured (milliseconds since the epoch)."""

    step: int
    at_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class TrackingTarget:
    """Where a run folder's MLflow run lives.

    Attributes:
        run_dir: The run folder.
        name: The run's name in MLflow.
        experiment: The experiment's name.
        uri: The tracking URI.
        is_default: Whether the URI is the one of the sqlite file beside the run folder.
    """

    run_dir: Path
    name: str
    experiment: str
    uri: str
    is_default: bool

    @property
    def recorded_uri(self) -> str | None:
        """The URI as the run folder's record has it."""
        return None if self.is_default else without_password(self.uri)


def quiet_mlflow() -> None:
    """Set MLflow's defaults for a job that must not wait for it or talk to others; what a user set stays.

    Call it before mlflow is imported: it reads some of these at import.
    """
    # mlflow knows no other way to say this: its settings are environment variables of its own
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # the tracker tries again by itself, later; MLflow's defaults are 120 s, seven times over
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        os.environ.setdefault(name, value)


class MlflowRun:
    """An open MLflow run. One thread uses it."""

    def __init__(self, client: Any, run_id: str, *, logged_steps: dict[str, int]) -> None:
        self._client = client
        self._run_id = run_id
        self._logged_steps = logged_steps

    def log_params(self, params: dict[str, str]) -> None:
        """Log parameters. MLflow's cannot change: of a resumed run's, a changed one becomes a tag."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", value) for key, value in params.items() if known.get(key, value) != value]
        for first in range(0, len(new), _PARAMS_A_BATCH):
            self._client.log_batch(self._run_id, params=new[first : first + _PARAMS_A_BATCH])
        for first in range(0, len(changed), _PARAMS_A_BATCH):
            self._client.log_batch(self._run_id, tags=changed[first : first + _PARAMS_A_BATCH])

    def log_once(self, measured: Sequence[Measured]) -> None:
        """Log metrics but those whose step was already logged, here or before a restart."""
        from mlflow.entities import RunTag

        reached = dict(self._logged_steps)
        fresh = []
        for one in measured:
            values = {key: value for key, value in one.values.items() if one.step > reached.get(key, -1)}
            reached.update(dict.fromkeys(values, one.step))
            fresh.append(Measured(step=one.step, at_ms=one.at_ms, values=values))
        # the steps reached travel with the metrics: a resumed run learns them from the server in one request
        self._log(fresh, tags=[RunTag(_LOGGED_STEPS, json.dumps(reached))])
        self._logged_steps = reached

    def log(self, measured: Sequence[Measured]) -> None:
        """Log metrics, those of a step already logged again."""
        self._log(measured, tags=[])

    def log_artifact(self, path: Path, *, folder: str | None) -> None:
        """Copy a file to the run's artifacts."""
        self._client.log_artifact(self._run_id, str(path), artifact_path=folder)

    def terminate(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._run_id, status=status)

    def _log(self, measured: Sequence[Measured], *, tags: list[Any]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, one.at_ms, one.step) for one in measured for key, value in one.values.items()]
        # the tags go with the last batch: they say that everything before is there
        room = _METRICS_A_BATCH - len(tags)
        for first in range(0, len(metrics), room):
            last = first + room >= len(metrics)
            self._client.log_batch(self._run_id, metrics=metrics[first : first + room], tags=tags if last else [])


def open_run(place: TrackingTarget) -> MlflowRun:
    """Return the run folder's MLflow run, RUNNING: the one its record names, else a new one."""
    client = _client(place.uri)
    record = read_record(place.run_dir)
    if record is not None and record.uri == place.recorded_uri:
        found = _find(client, record.run_id)
        if found is not None:
            client.update_run(record.run_id, status="RUNNING")
            return MlflowRun(client, record.run_id, logged_steps=_steps(found))
    experiment = client.get_experiment_by_name(place.experiment)
    experiment_id = (
        client.create_experiment(place.experiment, artifact_location=artifact_location(place.uri))
        if experiment is None
        else experiment.experiment_id
    )
    created = client.create_run(experiment_id, run_name=place.name, tags={"run_dir": str(place.run_dir.absolute())})
    run_id = created.info.run_id
    write_record(place.run_dir, RunRecord(run_id=run_id, uri=place.recorded_uri))
    return MlflowRun(client, run_id, logged_steps={})


def open_recorded_run(place: TrackingTarget) -> MlflowRun:
    """Return the MLflow run that the run folder's record names, its status left as it is.

    Raises:
        LookupError: there is no such record, or no such run on the server.
    """
    record = read_record(place.run_dir)
    if record is None or record.uri != place.recorded_uri:
        raise LookupError(f"{place.run_dir} names no run at {without_password(place.uri)}")
    client = _client(place.uri)
    if _find(client, record.run_id) is None:
        raise LookupError(f"run {record.run_id} is not there any more")
    return MlflowRun(client, record.run_id, logged_steps={})


def is_outage(error: Exception) -> bool:
    """Return whether an error may go away by itself: no connection, a locked database, a server that restarts."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, OSError)


def import_client() -> type[Any]:
    """Import mlflow, which takes seconds, and return its client's class."""
    from mlflow.tracking import MlflowClient

    return MlflowClient


def _client(uri: str) -> Any:
    client = import_client()
    # one line for every migration of a new database
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return client(tracking_uri=uri)


def _find(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _steps(run: Any) -> dict[str, int]:
    return {str(key): int(step) for key, step in json.loads(run.data.tags.get(_LOGGED_STEPS, "{}")).items()}
