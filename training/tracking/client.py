"""Access one MLflow run.

Every call may block for seconds, and may raise any error of MLflow, its database driver or the network.
`training.tracking.tracker` shields training from both.
"""

import getpass
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.start import environment
from training.incarnation import died_here
from training.tracking.record import RunRecord, read_record, write_record
from training.tracking.store import Store, create_file, follow_move, recorded_uri

# MLflow's limits per request
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
# A tag of the run with the last logged step of each metric, as JSON
_LOGGED_STEPS = "trainshort.logged_steps"


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step.

    Attributes:
        step: The step; None for what was measured at a time and not at a step: it is logged at the seconds since the
            MLflow run began, which go on growing over all starts.
        timestamp_ms: When they were measured, in milliseconds since the epoch.
        values: Value of each metric by name.
    """

    step: int | None
    timestamp_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class TrackingTarget:
    """Store, experiment and name of a run folder's MLflow run.

    Attributes:
        run_dir: The run folder.
        name: The run's name in MLflow.
        experiment: The experiment's name.
        store: Where it is logged.
        began_ms: When this start began, in milliseconds since the epoch: a new MLflow run began then too, also if the
            server answers only later.
    """

    run_dir: Path
    name: str
    experiment: str
    store: Store
    began_ms: int

    @property
    def recorded_uri(self) -> str | None:
        """The store's URI as the run folder's record holds it."""
        return recorded_uri(self.store, run_dir=self.run_dir)


def set_mlflow_defaults() -> None:
    """Set defaults so that MLflow neither blocks training for long nor sends telemetry; the user's settings win.

    Call it before mlflow is imported: it reads some of these at import.
    """
    # mlflow takes these settings only from environment variables
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # the tracker reports every error itself; MLflow would add tracebacks, which may show a password
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        # the tracker retries by itself; MLflow's defaults are 120 s and seven retries
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        os.environ.setdefault(name, value)


class MlflowRun:
    """An open MLflow run. Not safe to use from several threads."""

    def __init__(self, client: Any, target: TrackingTarget, info: Any, *, logged_steps: dict[str, int]) -> None:
        self._client = client
        self._target = target
        self._run_id = info.run_id
        self._began_ms = info.start_time
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
            if metric.step is None:
                new.append(metric)
                continue
            values = {key: value for key, value in metric.values.items() if metric.step > logged_steps.get(key, -1)}
            logged_steps.update(dict.fromkeys(values, metric.step))
            new.append(replace(metric, values=values))
        # the last steps are sent with the metrics, so that a resumed run gets them from the server in one request
        self._log(new, tags=[RunTag(_LOGGED_STEPS, json.dumps(logged_steps))])
        self._logged_steps = logged_steps

    def log(self, metrics: Sequence[StepMetrics]) -> None:
        """Log metrics, even of steps already logged."""
        self._log(metrics, tags=[])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of those of the same names."""
        from mlflow.entities import RunTag

        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_artifact(self, path: Path, *, folder: str | None) -> None:
        """Copy a file to the run's artifacts."""
        self._client.log_artifact(self._run_id, str(path), artifact_path=folder)

    def terminate(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; one that has ended keeps its status."""
        if self._client.get_run(self._run_id).info.status == "RUNNING":
            self._client.set_terminated(self._run_id, status=status)
        with suppress(OSError):  # a full disk; the run has its status
            self.record(is_open=False)

    def record(self, *, is_open: bool) -> None:
        """Record the run in its run folder, and whether it runs."""
        write_record(self._target.run_dir, RunRecord(self._run_id, self._target.recorded_uri, is_open=is_open))

    def _log(self, metrics: Sequence[StepMetrics], *, tags: list[Any]) -> None:
        from mlflow.entities import Metric

        entities = [
            Metric(key, value, metric.timestamp_ms, self._step_of(metric))
            for metric in metrics
            for key, value in metric.values.items()
        ]
        # the tags are sent with the last batch: they state that everything before was logged
        size = _METRICS_PER_REQUEST - len(tags)
        for first in range(0, len(entities), size):
            last = first + size >= len(entities)
            self._client.log_batch(self._run_id, metrics=entities[first : first + size], tags=tags if last else [])

    def _step_of(self, metric: StepMetrics) -> int:
        if metric.step is not None:
            return metric.step
        return int(max(0, (metric.timestamp_ms - self._began_ms) // 1000))


def open_run(target: TrackingTarget) -> MlflowRun:
    """Return the run folder's MLflow run with status RUNNING: the recorded one, else a new one."""
    record = read_record(target.run_dir)
    client = connect(target, run_id=record.run_id if record else None)
    recorded = find_recorded(client, record, target=target) if record else None
    folder = str(target.run_dir.absolute())
    if recorded is None:
        experiment = find_experiment(client, target)
        # MLflow takes the user only now
        tags = {"run_dir": folder, "mlflow.user": _user_name()}
        info = client.create_run(experiment, start_time=target.began_ms, run_name=target.name, tags=tags).info
    else:
        # its status is that of the last start, FAILED or KILLED
        info = recorded.info
        client.update_run(info.run_id, status="RUNNING")
        if recorded.data.tags.get("run_dir") != folder:
            client.set_tag(info.run_id, "run_dir", folder)
    return MlflowRun(client, target, info, logged_steps=_read_logged_steps(recorded) if recorded else {})


def open_recorded_run(target: TrackingTarget) -> MlflowRun:
    """Return the run folder's recorded MLflow run, without changing its status.

    Raises:
        LookupError: the folder has no record, or the run was deleted from the store.
    """
    record, file = read_record(target.run_dir), target.store.file
    if record is None:
        raise LookupError(f"{target.run_dir} names no run")
    if file is not None and not file.exists():  # MLflow would create it
        raise LookupError(f"{file} does not exist")
    client = connect(target, run_id=record.run_id)
    recorded = find_recorded(client, record, target=target)
    if recorded is None:
        raise LookupError(f"run {record.run_id} was deleted from the store")
    # no logged steps: metrics added here may be of any step
    return MlflowRun(client, target, recorded.info, logged_steps={})


def end_dead_runs(target: TrackingTarget) -> None:
    """End as KILLED the runs beside a run folder whose processes on this machine were killed before they could.

    They are logged to the same store. A run on another machine is left alone: from here nobody sees whether it lives.
    """
    for folder in sorted(target.run_dir.absolute().parent.iterdir()):
        record = read_record(folder)
        beside = replace(target, run_dir=folder)
        if record is not None and record.is_open and record.uri == beside.recorded_uri and died_here(folder):
            with suppress(Exception):  # an outage shows at the next record of this run
                open_recorded_run(beside).terminate("KILLED")


def import_client() -> type[Any]:
    """Import mlflow, which takes seconds, and return its client class."""
    from mlflow.tracking import MlflowClient

    return MlflowClient


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def connect(target: TrackingTarget, *, run_id: str | None) -> Any:
    """Return a client of the store, which is created first if it is a file that does not exist.

    Args:
        target: Whose store to open.
        run_id: A run whose artifacts are meant too, if the file was moved.
    """
    client = import_client()
    # alembic logs one line per migration of a new database
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if target.store.file is not None:
        create_file(target.store.file, fill=lambda uri: client(tracking_uri=uri).search_experiments(max_results=1))
        if follow_move(target.store.file, experiment=target.experiment, run_id=run_id):
            _forget_artifact_places()
    return client(tracking_uri=target.store.with_passwords(environment()))


def _forget_artifact_places() -> None:
    """Empty MLflow's cache of where runs keep their artifacts; it has no public name."""
    with suppress(ImportError, AttributeError):  # another version of MLflow; only a process that has seen both needs it
        from mlflow.tracking._tracking_service import utils

        utils._artifact_repos_cache.clear()


def find_experiment(client: Any, target: TrackingTarget) -> str:
    """Return the id of the experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(target.experiment)
    if experiment is None:
        try:
            return str(client.create_experiment(target.experiment, artifact_location=target.store.artifact_location))
        except MlflowException as error:
            # another run that starts now may have created it
            experiment = client.get_experiment_by_name(target.experiment)
            if experiment is None:
                raise error from None
    return str(experiment.experiment_id)


def find_recorded(client: Any, record: RunRecord, *, target: TrackingTarget) -> Any | None:
    """Return a recorded run if the store has it; a store that was moved or copied still does."""
    from mlflow.exceptions import MlflowException

    unknown = ["RESOURCE_DOES_NOT_EXIST"]
    if record.uri != target.recorded_uri:  # another store, which may refuse to look for a run that it does not know
        unknown += ["PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"]
    try:
        run = client.get_run(record.run_id)
    except MlflowException as error:
        if error.error_code in unknown:
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _read_logged_steps(run: Any) -> dict[str, int]:
    return {str(key): int(step) for key, step in json.loads(run.data.tags.get(_LOGGED_STEPS, "{}")).items()}
