"""Log a run to MLflow through the spool of its folder: nothing here waits for a server or raises."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.commands import typed_path
from parallel.start import environment
from training.observers import Status
from training.tracking.client import TrackingTarget, set_mlflow_defaults, user_name
from training.tracking.names import LONG_PARAMS, flatten, long_values, within_limits
from training.tracking.sender import Sender
from training.tracking.spool import now_ms
from training.tracking.store import DEFAULT_EXPERIMENT, EXPERIMENT_VARIABLE, STORE_VARIABLE, choose_store
from training.tracking.sync import target_of_folder

_logger = logging.getLogger(__name__)

# how long the end may take before a warning says why
SILENT_SECONDS = 3.0
# how long the end of what has failed may take: somebody waits for the error, and other ranks for the process to exit
_FAILED_SECONDS = 10.0


class MlflowTracker:
    """Tells the MLflow run of a run folder metrics and files: `put` spools an event, a background thread sends it.

    Build it on rank 0 only, and call `start` after training's modules are imported: the thread imports mlflow, which
    takes seconds. While the server does not answer, the tracker warns once, the events wait in the spool, and the
    thread retries with growing pauses.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        experiment: str | None,
        uri: str | None,
        offline: bool = False,
        target: TrackingTarget | None = None,
        first_pause_seconds: float = 5.0,
    ) -> None:
        """Build the tracker; it sends nothing before `start`.

        Args:
            run_dir: The run folder, which records its MLflow run in mlflow_run.json.
            name: The run's name in MLflow.
            experiment: The experiment's name; None for that of MLFLOW_EXPERIMENT_NAME, else trainshort.
            uri: Tracking URI; None for that of MLFLOW_TRACKING_URI, else a sqlite file beside the run folder.
            offline: Whether to spool only, and never connect.
            target: The run to add to, keeping its status, as in `attach`; None for a tracker that starts a run.
            first_pause_seconds: Pause before the first retry when the server does not answer.
        """
        set_mlflow_defaults()
        self._name, self._offline, self._attached = name, offline, target is not None
        self._experiment = experiment or environment().get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
        self._target = target or TrackingTarget(run_dir, choose_store(uri, run_dir=run_dir, environ=environment()))
        self._began_ms, self._is_closed = now_ms(), False
        self._sender = Sender(
            self._target,
            attached=self._attached,
            is_offline=offline,
            first_pause_seconds=first_pause_seconds,
        )
        if self._attached:
            self._sender.start()

    @property
    def summary(self) -> str:
        """Where the run is logged, in one line without secrets."""
        store = self._target.store
        if self._offline:
            return f"MLflow: offline, `trainshort track sync {typed_path(self._target.run_dir)}` sends what is recorded"
        origin = f" (from {STORE_VARIABLE})" if store.setting == STORE_VARIABLE else ""
        return f"MLflow: {store.public_uri}{origin}, experiment {self._experiment}"

    def put(self, event: Mapping[str, Any]) -> None:
        """Spool an event: a JSON-able dictionary with its `kind`, which `training.tracking.events.SENDERS` knows."""
        self._sender.writer.put({"time_ms": now_ms(), **event})
        if event["kind"] != "metrics":
            self._sender.wake()

    def start(
        self,
        params: Mapping[str, Any],
        config_file: Path,
        *,
        tags: Mapping[str, str] | None = None,
        listed_tags: Mapping[str, str] | None = None,
    ) -> None:
        """Open the run, new or resumed, with the configuration as parameters and as a file.

        Args:
            params: The configuration, nested or flat.
            config_file: The resolved run file.
            tags: Tags of the run; those of the newest start count.
            listed_tags: Tags that hold the values of all starts.
        """
        flat = flatten(dict(params))
        self.put(
            {
                "kind": "start",
                # a new MLflow run began now, also if the server answers only later
                "time_ms": self._began_ms,
                "name": self._name,
                "experiment": self._experiment,
                "user": user_name(),
                "uri": self._target.recorded_uri,
                "params": within_limits(flat),
                "tags": dict(tags or {}),
                "listed_tags": dict(listed_tags or {}),
            }
        )
        self.artifact(config_file)
        if long := long_values(flat):
            text = json.dumps(long, ensure_ascii=False, indent=1) + "\n"
            self.put({"kind": "text", "artifact": LONG_PARAMS, "text": text})
        self._sender.start()

    def metrics(self, step: int | None, values: Mapping[str, float | None], *, again: bool = False) -> None:
        """Log the values of a step, leaving out those that are None.

        Without a step they are logged at the seconds since the MLflow run began.

        Args:
            step: The step; one that was logged is not logged again, but by an attached tracker.
            values: The values by name.
            again: Whether to log it again.
        """
        known = {key: float(value) for key, value in values.items() if value is not None}
        event: dict[str, Any] = {"kind": "metrics", "step": step, "values": known}
        self.put({**event, "again": True} if self._attached or again else event)

    def artifact(self, path: Path, *, folder: str | None = None) -> None:
        """Log a file as it is now, in a folder of the run's artifacts."""
        kept = self._sender.writer.keep_file(path).absolute()
        run_dir = self._target.run_dir.absolute()
        # relative: the run folder may be moved, or be seen under another path, before it is sent
        text = str(kept.relative_to(run_dir) if kept.is_relative_to(run_dir) else kept)
        self.put({"kind": "artifact", "path": text, "folder": folder})

    def nested(
        self,
        name: str,
        *,
        kind: str,
        params: Mapping[str, Any],
        points: Sequence[tuple[str, float, int]],
        began_ms: int,
        status: Status = "FINISHED",
    ) -> None:
        """Log a run below the run, which has ended: an evaluation, or an export.

        Args:
            name: Its name in MLflow.
            kind: What it did, in a word: tag trainshort.kind.
            params: Its parameters, nested or flat.
            points: Name, value and step of its metrics.
            began_ms: When it began, in milliseconds since the epoch.
            status: How it ended.
        """
        ended_ms = now_ms()
        self.put(
            {
                "kind": "nested",
                "time_ms": ended_ms,
                "name": name,
                "began_ms": began_ms,
                "status": status,
                "params": within_limits(flatten(dict(params))),
                "tags": {"trainshort.kind": kind, "mlflow.source.name": f"trainshort {kind}"},
                "points": [(key, float(value), ended_ms, step) for key, value, step in points],
            }
        )

    def flush(self) -> None:
        """Flush what was spooled to disk."""
        self._sender.writer.flush()

    def finish(self, status: Status, *, wait_seconds: float | None = None) -> None:
        """Send the rest and end the run; wait at most `wait_seconds`.

        An attached tracker ends a run only if the process that trained it did not.
        """
        if not self._sender.is_alive:
            return  # never started, or already closed
        if wait_seconds is None:
            wait_seconds = _FAILED_SECONDS if status == "FAILED" else 60.0
        self.put({"kind": "ended" if self._attached else "finish", "status": status})
        self.close(wait_seconds=wait_seconds)

    def close(self, *, wait_seconds: float = 60.0) -> None:
        """Send the rest and keep the run's status; wait at most `wait_seconds`. A second call does nothing."""
        if self._is_closed or not self._sender.is_alive:
            return
        self._is_closed = True
        self._sender.close()
        is_done = self._sender.join(min(wait_seconds, SILENT_SECONDS))
        remaining = wait_seconds - SILENT_SECONDS
        if not is_done and remaining > 0:
            _logger.info("sending the last records to MLflow, for at most %g s more", remaining)
            is_done = self._sender.join(remaining)
        if not is_done:
            self._sender.warn(f"took longer than {wait_seconds:g} s to take the last records")
        self._sender.say_what_waits()


def attach(run_dir: Path, *, uri: str | None, offline: bool = False) -> MlflowTracker | None:
    """Return a tracker that adds to the MLflow run of a run folder, or None if there is no such run.

    It logs metrics of any step, even of steps already logged. End it with `close`, or use `attached`.

    Args:
        run_dir: The run folder.
        uri: Tracking URI that the run was started with.
        offline: Whether to spool only, and never connect.
    """
    target = target_of_folder(run_dir, uri=uri)
    if target is None:
        return None
    return MlflowTracker(run_dir, name="", experiment="", uri=uri, offline=offline, target=target)


@contextmanager
def attached(run_dir: Path, *, uri: str | None, offline: bool = False) -> Iterator[MlflowTracker | None]:
    """Attach a tracker for a block, as `attach` does, and close it however the block ends.

    Args:
        run_dir: The run folder.
        uri: Tracking URI that the run was started with.
        offline: Whether to spool only, and never connect.
    Yields:
        The tracker, or None if there is no such run. The block may close it earlier.
    """
    tracker = attach(run_dir, uri=uri, offline=offline)
    if tracker is None:
        yield None
        return
    try:
        yield tracker
    except BaseException:
        tracker.close(wait_seconds=_FAILED_SECONDS)
        raise
    tracker.close()
