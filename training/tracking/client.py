"""Open the MLflow run of a run folder.

Every call may block for seconds, and may raise any error of MLflow, its database driver or the network.
`training.tracking.sender` shields training from both.
"""

import getpass
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from parallel.start import environment
from training.tracking.events import LOGGED_STEPS, SENT, create_once
from training.tracking.record import RunRecord, read_record, write_record
from training.tracking.spool import Event
from training.tracking.store import DEFAULT_EXPERIMENT, Store, create_file, follow_move, recorded_uri


@dataclass(frozen=True)
class TrackingTarget:
    """Store of a run folder's MLflow run.

    Attributes:
        run_dir: The run folder.
        store: Where it is logged.
    """

    run_dir: Path
    store: Store

    @property
    def recorded_uri(self) -> str | None:
        """The store's URI as the run folder's record holds it."""
        return recorded_uri(self.store, run_dir=self.run_dir)


@dataclass
class OpenRun:
    """An open MLflow run.

    Attributes:
        client: MLflow's client.
        run_id: The run.
        began_ms: When it began, in milliseconds since the epoch.
        logged_steps: The last step of each metric that is logged once a step.
        sent: The file of the spool and the number of the event that the last request of metrics ended with.
    """

    client: Any
    run_id: str
    began_ms: int
    logged_steps: dict[str, int]
    sent: tuple[str, int] | None

    def refresh(self) -> None:
        """Read again what the store's tags say: a request whose answer was lost may have arrived."""
        fresh = OpenRun.of(self.client, self.client.get_run(self.run_id))
        self.logged_steps, self.sent = fresh.logged_steps, fresh.sent

    @classmethod
    def of(cls, client: Any, run: Any) -> "OpenRun":
        """Return a run of the store with what its tags say of the metrics in it."""
        tags: Mapping[str, str] = run.data.tags
        steps = {str(key): int(step) for key, step in json.loads(tags.get(LOGGED_STEPS, "{}")).items()}
        name, _, number = tags.get(SENT, "").rpartition(" ")
        sent = (name, int(number)) if name and number.isdecimal() else None
        return cls(client, run.info.run_id, run.info.start_time or 0, steps, sent)

    def step_at(self, time_ms: int) -> int:
        """Return the step of what was measured at a time and not at a step: seconds since the run began."""
        return int(max(0, (time_ms - self.began_ms) // 1000))


def set_mlflow_defaults() -> None:
    """Set defaults so that MLflow neither blocks training for long nor sends telemetry; the user's settings win.

    Call it before mlflow is imported: it reads some of these at import.
    """
    # mlflow takes these settings only from environment variables
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # the sender reports every error itself; MLflow would add tracebacks, which may show a password
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        # the sender retries by itself; MLflow's defaults are 120 s and seven retries
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        os.environ.setdefault(name, value)


def open_run(target: TrackingTarget, start: Event) -> OpenRun:
    """Return the run folder's MLflow run with status RUNNING: the recorded one, else a new one that began at a start.

    Args:
        target: The store.
        start: An event of kind `start`.
    """
    record = read_record(target.run_dir)
    experiment = start["experiment"] or DEFAULT_EXPERIMENT
    client = connect(target, run_id=record.run_id if record else None, experiment=experiment)
    run = find_recorded(client, record, target=target) if record else None
    folder = str(target.run_dir.absolute())
    if run is None or record is None or _is_copied(target.run_dir, record, tagged=run.data.tags.get("run_dir")):
        # a run has a user only from the request that makes it
        tags = {"run_dir": folder, "mlflow.user": start["user"]}
        home = find_experiment(client, target, name=experiment)
        run = create_once(client, home, start, began_ms=start["time_ms"], tags=tags)
    else:
        # its status is that of the last start, FAILED or KILLED
        client.update_run(run.info.run_id, status="RUNNING")
        if run.data.tags.get("run_dir") != folder:
            client.set_tag(run.info.run_id, "run_dir", folder)
    record_run(target, run.info.run_id, is_open=True)
    return OpenRun.of(client, run)


def _is_copied(run_dir: Path, record: RunRecord, *, tagged: str | None) -> bool:
    """Return whether a run folder is a copy: the one that its MLflow run is of is still there, with the same store."""
    other = Path(tagged or run_dir)
    theirs = read_record(other)
    if theirs is None or (theirs.run_id, theirs.uri) != (record.run_id, record.uri) or other.samefile(run_dir):
        return False
    return record.uri is not None or other.parent.samefile(run_dir.absolute().parent)


def open_recorded_run(target: TrackingTarget) -> OpenRun:
    """Return the run folder's recorded MLflow run, without changing its status.

    Raises:
        LookupError: the folder has no record, or the run was deleted from the store.
    """
    record, file = read_record(target.run_dir), target.store.file
    if record is None:
        raise LookupError(f"{target.run_dir} names no run")
    if file is not None and not file.exists():  # MLflow would create it
        raise LookupError(f"{file} does not exist")
    client = connect(target, run_id=record.run_id, experiment=None)
    run = find_recorded(client, record, target=target)
    if run is None:
        raise LookupError(f"run {record.run_id} was deleted from the store")
    return OpenRun.of(client, run)


def record_run(target: TrackingTarget, run_id: str, *, is_open: bool) -> None:
    """Record the run in its run folder, and whether it runs; on a full disk nothing is recorded."""
    with suppress(OSError):
        write_record(target.run_dir, RunRecord(run_id, target.recorded_uri, is_open=is_open))


def import_client() -> type[Any]:
    """Import mlflow, which takes seconds, and return its client class."""
    from mlflow.tracking import MlflowClient

    return MlflowClient


def user_name() -> str:
    """Return the name of the user, which MLflow takes when a run is made."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def connect(target: TrackingTarget, *, run_id: str | None, experiment: str | None) -> Any:
    """Return a client of the store, which is created first if it is a file that does not exist.

    Args:
        target: Whose store to open.
        run_id: A run whose artifacts are meant too, if the file was moved.
        experiment: Name of an experiment whose artifacts are meant.
    """
    client = import_client()
    # alembic logs one line per migration of a new database
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if target.store.file is not None:
        create_file(target.store.file, fill=partial(_fill, artifacts=target.store.artifact_location))
        if follow_move(target.store.file, experiment=experiment, run_id=run_id):
            _forget_artifact_places()
    return client(tracking_uri=target.store.with_passwords(environment()))


def _fill(uri: str, *, artifacts: str | None) -> None:
    """Create MLflow's tables in a sqlite file; its default experiment keeps its artifacts there."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # a client would name a place in the current folder, in SQL that a colon or both kinds of quotes break
    SqlAlchemyStore(uri, artifacts)  # type: ignore[no-untyped-call]


def _forget_artifact_places() -> None:
    """Empty MLflow's cache of where runs keep their artifacts; it has no public name."""
    with suppress(ImportError, AttributeError):  # another version of MLflow; only a process that has seen both needs it
        from mlflow.tracking._tracking_service import utils

        utils._artifact_repos_cache.clear()


def find_experiment(client: Any, target: TrackingTarget, *, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=target.store.artifact_location))
        except MlflowException as error:
            # another run that starts now may have created it
            experiment = client.get_experiment_by_name(name)
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
