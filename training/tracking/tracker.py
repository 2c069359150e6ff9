"""Send metrics and files to MLflow from a background thread that never blocks training and never raises."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.secrets import hide_secrets
from parallel.start import environment
from training.observers import Status
from training.tracking.client import (
    MlflowRun,
    StepMetrics,
    TrackingTarget,
    end_dead_runs,
    import_client,
    open_recorded_run,
    open_run,
    set_mlflow_defaults,
)
from training.tracking.failures import advice_on, may_pass, reason_of
from training.tracking.record import flatten, read_record
from training.tracking.store import (
    DEFAULT_EXPERIMENT,
    EXPERIMENT_VARIABLE,
    STORE_VARIABLE,
    choose_store,
    recorded_store,
)

_logger = logging.getLogger(__name__)

# one request for all metrics of this period: a request per step would hold the interpreter lock too often
_BATCH_SECONDS = 2.0
# pauses between retries double from the first one up to this
_LONGEST_PAUSE_SECONDS = 300.0
# how long an outage may last once training has ended, and the pause between retries then
_CLOSING_SECONDS, _CLOSING_PAUSE_SECONDS = 5.0, 0.5
# how long the end may take before a person is told why
SILENT_SECONDS = 3.0
# bounds the memory that an outage takes; metrics.jsonl has everything anyway
_MAX_WAITING_RECORDS = 100_000


@dataclass(frozen=True)
class _Start:
    params: dict[str, str]
    tags: dict[str, str]
    config_file: Path


@dataclass(frozen=True)
class _Artifact:
    path: Path
    folder: str | None


@dataclass(frozen=True)
class _Close:
    status: Status | None


_Record = _Start | StepMetrics | _Artifact | _Close


class MlflowTracker:
    """Send metrics and files to the MLflow run of a run folder, from a background thread.

    Build it on rank 0 only, and call `start` after training's modules are imported: the thread imports mlflow, which
    takes seconds. While the server does not answer, the tracker warns once, keeps the records, and retries with
    growing pauses.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        experiment: str | None,
        uri: str | None,
        attached: bool = False,
        warns: bool = True,
        first_pause_seconds: float = 5.0,
    ) -> None:
        """Build the tracker; it sends nothing before `start`.

        Args:
            run_dir: The run folder, which records its MLflow run in mlflow_run.json.
            name: The run's name in MLflow.
            experiment: The experiment's name; None for that of MLFLOW_EXPERIMENT_NAME, else trainshort.
            uri: Tracking URI; None for that of MLFLOW_TRACKING_URI, else a sqlite file beside the run folder.
            attached: Add to an existing run and keep its status, as in `attach`.
            warns: Whether to warn when something cannot be logged; if not, only `--verbose` shows it.
            first_pause_seconds: Pause before the first retry when the server does not answer.
        """
        set_mlflow_defaults()
        record = read_record(run_dir) if attached else None
        self._target = TrackingTarget(
            run_dir=run_dir,
            name=name,
            experiment=experiment or environment().get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT,
            store=recorded_store(record, uri=uri, run_dir=run_dir, variables=environment())
            if record
            else choose_store(uri, run_dir=run_dir, variables=environment()),
            began_ms=_now_ms(),
        )
        self._queue: queue.SimpleQueue[_Record] = queue.SimpleQueue()
        self._sender = _Sender(
            self._target,
            self._queue,
            attached=attached,
            level=logging.WARNING if warns else logging.DEBUG,
            first_pause_seconds=first_pause_seconds,
        )
        self._thread = threading.Thread(target=self._sender.run, name="mlflow", daemon=True)
        if attached:
            self._thread.start()

    @property
    def summary(self) -> str:
        """Where the run is logged, in one line without secrets."""
        store = self._target.store
        origin = f" (from {STORE_VARIABLE})" if store.setting == STORE_VARIABLE else ""
        return f"MLflow: {store.public_uri}{origin}, experiment {self._target.experiment}"

    def start(self, params: Mapping[str, Any], config_file: Path, *, tags: Mapping[str, str] | None = None) -> None:
        """Open the run, new or resumed, with the configuration as parameters and as a file.

        Args:
            params: The configuration, nested or flat.
            config_file: The resolved run file.
            tags: Tags of the run; those of the newest start count.
        """
        self._put(_Start(params=flatten(dict(params)), tags=dict(tags or {}), config_file=config_file))
        self._thread.start()

    def metrics(self, step: int | None, values: Mapping[str, float | None]) -> None:
        """Log the values of a step, leaving out those that are None. A step already logged is not logged again.

        Without a step they are logged at the seconds since the MLflow run began.
        """
        known = {key: float(value) for key, value in values.items() if value is not None}
        self._put(StepMetrics(step=step, timestamp_ms=_now_ms(), values=known))

    def artifact(self, path: Path, *, folder: str | None = None) -> None:
        """Log a file, in a folder of the run's artifacts."""
        self._put(_Artifact(path=path, folder=folder))

    def finish(self, status: Status, *, wait_seconds: float | None = None) -> None:
        """Send the rest and end the run; wait at most `wait_seconds`."""
        if wait_seconds is None:
            # The ranks of a failed run wait for this one to exit.
            wait_seconds = 10.0 if status == "FAILED" else 60.0
        self._close(_Close(status=status), wait_seconds=wait_seconds)

    def close(self, *, wait_seconds: float = 60.0) -> None:
        """Send the rest and keep the run's status; wait at most `wait_seconds`."""
        self._close(_Close(status=None), wait_seconds=wait_seconds)

    def _close(self, record: _Close, *, wait_seconds: float) -> None:
        if not self._thread.is_alive():
            return  # never started, or already closed
        self._put(record)
        self._thread.join(min(wait_seconds, SILENT_SECONDS))
        remaining = wait_seconds - SILENT_SECONDS
        if self._thread.is_alive() and remaining > 0:
            _logger.info("sending the last records to MLflow, for at most %g s more", remaining)
            self._thread.join(remaining)
        if self._thread.is_alive():
            self._sender.warn(f"took longer than {wait_seconds:g} s to end the run: its last records may be missing")

    def _put(self, record: _Record) -> None:
        if self._sender.waiting >= _MAX_WAITING_RECORDS and not isinstance(record, _Close):
            self._sender.warn(f"has {_MAX_WAITING_RECORDS} records waiting: further ones are dropped")
        else:
            self._queue.put(record)


def attach(run_dir: Path, *, uri: str | None, warns: bool = True) -> MlflowTracker | None:
    """Return a tracker that adds to the MLflow run of a run folder, or None if there is no such run.

    It logs metrics of any step, even of steps already logged. End it with `close`.

    Args:
        run_dir: The run folder.
        uri: Tracking URI that the run was started with.
        warns: Whether to warn when something cannot be logged.
    """
    if read_record(run_dir) is None:
        return None
    return MlflowTracker(run_dir, name="", experiment="", uri=uri, attached=True, warns=warns)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Sender:
    """Take records from the queue in order, and keep each one until it is sent. Runs in the background thread."""

    def __init__(
        self,
        target: TrackingTarget,
        records: queue.SimpleQueue[_Record],
        *,
        attached: bool,
        level: int,
        first_pause_seconds: float,
    ) -> None:
        self._target = target
        self._queue = records
        self._attached = attached
        self._level = level
        self._first_pause_seconds = first_pause_seconds
        self._pending: deque[_Record] = deque()
        self._run: MlflowRun | None = None
        # 0 while the server answers
        self._pause_seconds = 0.0
        self._closing_until: float | None = None
        self._warned = threading.Event()  # set by either thread
        self._done = False

    @property
    def waiting(self) -> int:
        """Number of records not sent yet."""
        return self._queue.qsize() + len(self._pending)

    def run(self) -> None:
        """Send records until one closes the run."""
        with suppress(ImportError):  # reported when the first record is sent
            import_client()
        while not self._done:
            self._collect()
            try:
                self._send()
                self._pause_seconds = 0.0
            except Exception as error:  # noqa: BLE001  no error of MLflow may reach training
                self._handle_error(error)

    def warn(self, problem: str) -> None:
        """Log a warning once per tracker: one per failed request would flood training's log."""
        if not self._warned.is_set():
            self._warned.set()
            text = f"MLflow at {self._target.store.public_uri} {problem}"
            _logger.log(self._level, "%s", hide_secrets(text, known=self._target.store.secrets(environment())))

    def _collect(self) -> None:
        """Move records from the queue to the pending ones until they should be sent."""
        if not self._pending:
            self._pending.append(self._queue.get())  # blocks until there is something to send
        deadline = time.monotonic() + (self._pause_seconds or _BATCH_SECONDS)
        with suppress(queue.Empty):
            while True:
                while not self._queue.empty():
                    self._pending.append(self._queue.get())
                if self._is_urgent():
                    return
                self._pending.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))

    def _is_urgent(self) -> bool:
        """Return whether to send now: for the last record, and for all but metrics while the server answers."""
        if self._pause_seconds:
            return isinstance(self._pending[-1], _Close)
        return not all(isinstance(record, StepMetrics) for record in self._pending)

    def _send(self) -> None:
        while self._pending:
            if self._run is None:
                self._run = open_recorded_run(self._target) if self._attached else open_run(self._target)
            record = self._pending[0]
            if isinstance(record, StepMetrics):
                self._send_metrics(self._run)
                continue
            if isinstance(record, _Start):
                self._run.record(is_open=True)
                self._run.set_tags(record.tags)
                self._run.log_params(record.params)
                self._run.log_artifact(record.config_file, folder=None)
                end_dead_runs(self._target)
            elif isinstance(record, _Artifact):
                self._run.log_artifact(record.path, folder=record.folder)
            else:
                if record.status is not None:
                    self._run.terminate(record.status)
                self._done = True
            self._pending.popleft()  # after the send: a failed record stays for the retry

    def _send_metrics(self, run: MlflowRun) -> None:
        """Send the pending metrics up to the next other record in one batch."""
        batch: list[StepMetrics] = []
        for record in self._pending:
            if not isinstance(record, StepMetrics):
                break
            batch.append(record)
        if self._attached:
            run.log(batch)
        else:
            run.log_new(batch)
        for _ in batch:
            self._pending.popleft()

    def _handle_error(self, error: Exception) -> None:
        """Keep the records if the error may pass, otherwise drop the refused one."""
        reason, advice = reason_of(error), advice_on(error, store=self._target.store)
        closing = isinstance(self._pending[-1], _Close)
        if may_pass(error) and closing:
            self._wait_for_the_end(reason, advice=advice)
        elif may_pass(error):
            self.warn(
                f"cannot be reached ({reason}): training continues, and the records are sent if it answers in time; "
                f"{advice}"
            )
            self._pause_seconds = min(max(2 * self._pause_seconds, self._first_pause_seconds), _LONGEST_PAUSE_SECONDS)
        elif self._run is None:
            self.warn(f"refuses this run ({reason}): nothing is logged there; {advice}")
            # keep reading: nobody else empties the queue
            self._done = closing or self._drop_all()
        else:
            self.warn(f"refuses a record ({reason}): it is dropped; {advice}")
            self._pending.popleft()

    def _wait_for_the_end(self, reason: str, *, advice: str) -> None:
        """Pause before a retry once training has ended, which must not wait for long."""
        self._closing_until = self._closing_until or time.monotonic() + _CLOSING_SECONDS
        if time.monotonic() < self._closing_until:
            time.sleep(_CLOSING_PAUSE_SECONDS)
        else:
            self.warn(f"cannot be reached ({reason}): {len(self._pending) - 1} records are missing there; {advice}")
            self._done = True

    def _drop_all(self) -> bool:
        """Drop records until one closes the run, then return True."""
        while not isinstance(self._queue.get(), _Close):
            pass
        return True
