"""Access one MLflow run. This is the only module that imports mlflow.

Every call may block for seconds, and may raise any error of MLflow, its database driver or the network.
`training.tracking.tracker` shields training from both.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.tracking.record import RunRecord, artifact_location, read_record, without_password, write_record

# MLflow's limits per request
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
# A tag of the run with the last logged step of each metric, as JSON
_LOGGED_STEPS = "trainshort.logged_steps"


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step.

    Attributes:
        step: The step.
        timestamp_ms: When they were measured, in milliseconds since the epoch.
        values: Value of each metric by name.
    """

    step: int
    timestamp_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class TrackingTarget:
    """Server, experiment and name of a run folder's MLflow run.

    Attributes:
        run_dir: The run folder.
        name: The run's name in MLflow.
        experiment: The experiment's name.
        uri: The tracking URI.
        is_default: Whether the URI is that of the sqlite file beside the run folder.
    """

    run_dir: Path
    name: str
    experiment: str
    uri: str
    is_default: bool

    @property
    def recorded_uri(self) -> str | None:
        """The URI as the run folder's record holds it."""
        return None if self.is_default else without_password(self.uri)


def set_mlflow_defaults() -> None:
    """Set defaults so that MLflow neither blocks training for long nor sends telemetry; the user's settings win.

    Call it before mlflow is imported: it reads some of these at import.
    """
    # mlflow takes these settings only from environment variables
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # the tracker retries by itself; MLflow's defaults are 120 s and seven retries
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        os.environ.setdefault(name, value)


class MlflowRun:
    """An open MLflow run. Not safe to use from several threads."""

    def __init__(self, client: Any, run_id: str, *, logged_steps: dict[str, int]) -> None:
        self._client = client
        self._run_id = run_id
        self._logged_steps = logged_steps

    def log_params(self, params: dict[str, str]) -> None:
        """Log parameters. MLflow does not let them change: if a resumed run changes one, it is logged as a tag."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", value) for key, value in params.items() if known.get(key, value) != value]
        for first in range(0, len(new), _PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=new[first : first + _PARAMS_PER_REQUEST])
        for first in range(0, len(changed), _PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, tags=changed[first : first + _PARAMS_PER_REQUEST])

    def log_new(self, metrics: Sequence[StepMetrics]) -> None:
        """Log metrics, except those of steps already logged, by this process or before a restart."""
        from mlflow.entities import RunTag

        logged_steps = dict(self._logged_steps)
        new = []
        for metric in metrics:
            values = {key: value for key, value in metric.values.items() if metric.step > logged_steps.get(key, -1)}
            logged_steps.update(dict.fromkeys(values, metric.step))
            new.append(replace(metric, values=values))
        # the last steps are sent with the metrics, so that a resumed run gets them from the server in one request
        self._log(new, tags=[RunTag(_LOGGED_STEPS, json.dumps(logged_steps))])
        self._logged_steps = logged_steps

    def log(self, metrics: Sequence[StepMetrics]) -> None:
        """Log metrics, even of steps already logged."""
        self._log(metrics, tags=[])

    def log_artifact(self, path: Path, *, folder: str | None) -> None:
        """Copy a file to the run's artifacts."""
        self._client.log_artifact(self._run_id, str(path), artifact_path=folder)

    def terminate(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._run_id, status=status)

    def _log(self, metrics: Sequence[StepMetrics], *, tags: list[Any]) -> None:
        from mlflow.entities import Metric

        entities = [
            Metric(key, value, metric.timestamp_ms, metric.step)
            for metric in metrics
            for key, value in metric.values.items()
        ]
        # the tags are sent with the last batch: they state that everything before was logged
        size = _METRICS_PER_REQUEST - len(tags)
        for first in range(0, len(entities), size):
            last = first + size >= len(entities)
            self._client.log_batch(self._run_id, metrics=entities[first : first + size], tags=tags if last else [])


def open_run(target: TrackingTarget) -> MlflowRun:
    """Return the run folder's MLflow run with status RUNNING: the recorded one, else a new one."""
    client = _client(target.uri)
    record = read_record(target.run_dir)
    if record is not None and record.uri == target.recorded_uri:
        recorded = _find_run(client, record.run_id)
        if recorded is not None:
            # its status is that of the last start, FAILED or KILLED
            client.update_run(record.run_id, status="RUNNING")
            return MlflowRun(client, record.run_id, logged_steps=_read_logged_steps(recorded))
    experiment = client.get_experiment_by_name(target.experiment)
    experiment_id = (
        client.create_experiment(target.experiment, artifact_location=artifact_location(target.uri))
        if experiment is None
        else experiment.experiment_id
    )
    created = client.create_run(experiment_id, run_name=target.name, tags={"run_dir": str(target.run_dir.absolute())})
    run_id = created.info.run_id
    write_record(target.run_dir, RunRecord(run_id=run_id, uri=target.recorded_uri))
    return MlflowRun(client, run_id, logged_steps={})


def open_recorded_run(target: TrackingTarget) -> MlflowRun:
    """Return the run folder's recorded MLflow run, without changing its status.

    Raises:
        LookupError: the folder has no record, or the server no longer has the run.
    """
    record = read_record(target.run_dir)
    if record is None or record.uri != target.recorded_uri:
        raise LookupError(f"{target.run_dir} names no run at {without_password(target.uri)}")
    client = _client(target.uri)
    if _find_run(client, record.run_id) is None:
        raise LookupError(f"run {record.run_id} is not there any more")
    # no logged steps: metrics added here may be of any step
    return MlflowRun(client, record.run_id, logged_steps={})


def is_outage(error: Exception) -> bool:
    """Return whether an error may pass by itself: no connection, a locked database, a server that restarts."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, OSError)


def import_client() -> type[Any]:
    """Import mlflow, which takes seconds, and return its client class."""
    from mlflow.tracking import MlflowClient

    return MlflowClient


def _client(uri: str) -> Any:
    client = import_client()
    # alembic logs one line per migration of a new database
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return client(tracking_uri=uri)


def _find_run(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _read_logged_steps(run: Any) -> dict[str, int]:
    return {str(key): int(step) for key, step in json.loads(run.data.tags.get(_LOGGED_STEPS, "{}")).items()}
