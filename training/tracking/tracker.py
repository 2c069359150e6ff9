"""An MLflow observer that cannot hurt training: it never blocks and never raises."""

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

from training.observers import Status
from training.tracking.client import (
    Measured,
    MlflowRun,
    TrackingTarget,
    import_client,
    is_outage,
    open_recorded_run,
    open_run,
    quiet_mlflow,
)
from training.tracking.record import default_uri, flatten, read_record, without_password

_logger = logging.getLogger(__name__)

# metrics of this many seconds go out together: a request a step would take the interpreter from training
_GATHER_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0
# what an outage may pile up; metrics.jsonl holds all of it anyway
_MOST_WAITING = 100_000


@dataclass(frozen=True)
class _Start:
    params: dict[str, str]
    config_file: Path


@dataclass(frozen=True)
class _Artifact:
    path: Path
    folder: str | None


@dataclass(frozen=True)
class _Close:
    status: Status | None


_Record = _Start | Measured | _Artifact | _Close


class MlflowTracker:
    """Sends what it is told to the MLflow run of a run folder, from a thread of its own.

    Build it on rank 0 only, and `start` it when the modules that training needs are imported: the thread imports
    mlflow, which takes seconds. While a server does not answer, one warning says so, records are kept, and the
    thread tries again with growing pauses.
    """

    def __init__(self, run_dir: Path, *, name: str, experiment: str, uri: str | None, attached: bool = False) -> None:
        """Prepare; nothing is sent before `start`.

        Args:
            run_dir: The run folder; it names its MLflow run in mlflow_run.json.
            name: The run's name in MLflow.
            experiment: The experiment's name.
            uri: Tracking URI; None for a sqlite file beside the run folder.
            attached: Only add to a run that exists, and leave its status alone: see `attach`.
        """
        quiet_mlflow()
        place = TrackingTarget(
            run_dir=run_dir,
            name=name,
            experiment=experiment,
            uri=uri or default_uri(run_dir),
            is_default=uri is None,
        )
        self._queue: queue.SimpleQueue[_Record] = queue.SimpleQueue()
        self._sender = _Sender(place, self._queue, attached=attached)
        self._thread = threading.Thread(target=self._sender.run, name="mlflow", daemon=True)
        if attached:
            self._thread.start()

    def start(self, params: Mapping[str, Any], config_file: Path) -> None:
        """Open the run, new or resumed, with the configuration as parameters and as a file.

        Args:
            params: The configuration, nested or flat.
            config_file: The resolved run file.
        """
        self._put(_Start(params=flatten(dict(params)), config_file=config_file))
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the values of a step; a None is left out. Steps already logged are not logged twice."""
        known = {key: float(value) for key, value in values.items() if value is not None}
        self._put(Measured(step=step, at_ms=time.time_ns() // 1_000_000, values=known))

    def artifact(self, path: Path, *, folder: str | None = None) -> None:
        """Log a file, under a folder of the run's artifacts."""
        self._put(_Artifact(path=path, folder=folder))

    def finish(self, status: Status, *, wait_seconds: float = 30.0) -> None:
        """Send the rest and end the run, waiting no longer than `wait_seconds`."""
        self._close(_Close(status=status), wait_seconds=wait_seconds)

    def close(self, *, wait_seconds: float = 30.0) -> None:
        """Send the rest and leave the run's status as it is, waiting no longer than `wait_seconds`."""
        self._close(_Close(status=None), wait_seconds=wait_seconds)

    def _close(self, record: _Close, *, wait_seconds: float) -> None:
        if not self._thread.is_alive():
            return  # never started, or closed before
        self._put(record)
        self._thread.join(wait_seconds)
        if self._thread.is_alive():
            self._sender.warn(f"took longer than {wait_seconds:g} s to end the run: its last records may be missing")

    def _put(self, record: _Record) -> None:
        if self._sender.waiting >= _MOST_WAITING and not isinstance(record, _Close):
            self._sender.warn(f"has {_MOST_WAITING} records waiting: further ones are dropped")
        else:
            self._queue.put(record)


def attach(run_dir: Path, *, uri: str | None) -> MlflowTracker | None:
    """Return a tracker that adds to the MLflow run of a run folder, or None where there is none.

    It sends metrics of any step, also a second time, and is ended by `close`.

    Args:
        run_dir: The run folder.
        uri: Tracking URI, as the run was started with.
    """
    if read_record(run_dir) is None:
        return None
    return MlflowTracker(run_dir, name="", experiment="", uri=uri, attached=True)


class _Sender:
    """The thread's side: takes records from the queue in order, and keeps them until they are sent."""

    def __init__(self, place: TrackingTarget, records: queue.SimpleQueue[_Record], *, attached: bool) -> None:
        self._place = place
        self._queue = records
        self._attached = attached
        self._pending: deque[_Record] = deque()
        self._run: MlflowRun | None = None
        self._pause_seconds = 0.0
        self._warned = threading.Event()
        self._done = False

    @property
    def waiting(self) -> int:
        """Records not sent yet."""
        return self._queue.qsize() + len(self._pending)

    def run(self) -> None:
        """Send until a record closes the run."""
        with suppress(ImportError):  # said when a record is to be sent
            import_client()
        while not self._done:
            self._collect()
            try:
                self._send()
                self._pause_seconds = 0.0
            except Exception as error:  # noqa: BLE001  whatever MLflow raises, training must not notice
                self._fail(error)

    def warn(self, what: str) -> None:
        """Warn once in the life of this tracker: training's log is not the place for each lost request."""
        if not self._warned.is_set():
            self._warned.set()
            _logger.warning("MLflow at %s %s", without_password(self._place.uri), what)

    def _collect(self) -> None:
        """Move records from the queue to the pending ones until it is time to send."""
        if not self._pending:
            self._pending.append(self._queue.get())
        deadline = time.monotonic() + (self._pause_seconds or _GATHER_SECONDS)
        while not self._is_urgent(self._pending[-1]):
            try:
                self._pending.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return

    def _is_urgent(self, record: _Record) -> bool:
        """Return whether a record cannot wait: the last one, and in good times all but metrics."""
        return isinstance(record, _Close) or (self._pause_seconds == 0.0 and not isinstance(record, Measured))

    def _send(self) -> None:
        while self._pending:
            if self._run is None:
                self._run = open_recorded_run(self._place) if self._attached else open_run(self._place)
            record = self._pending[0]
            if isinstance(record, Measured):
                self._send_metrics(self._run)
                continue
            if isinstance(record, _Start):
                self._run.log_params(record.params)
                self._run.log_artifact(record.config_file, folder=None)
            elif isinstance(record, _Artifact):
                self._run.log_artifact(record.path, folder=record.folder)
            else:
                if record.status is not None:
                    self._run.terminate(record.status)
                self._done = True
            self._pending.popleft()

    def _send_metrics(self, run: MlflowRun) -> None:
        together: list[Measured] = []
        for record in self._pending:
            if not isinstance(record, Measured):
                break
            together.append(record)
        if self._attached:
            run.log(together)
        else:
            run.log_once(together)
        for _ in together:
            self._pending.popleft()

    def _fail(self, error: Exception) -> None:
        """Keep the records for later where that may help, else drop what was refused."""
        reason = " ".join(str(error).split())[:200]
        closing = isinstance(self._pending[-1], _Close)
        if _can_wait(error) and closing:
            self.warn(f"cannot be reached ({reason}): {len(self._pending) - 1} records are missing there")
            self._done = True
        elif _can_wait(error):
            self.warn(f"cannot be reached ({reason}): training goes on, and what is logged is sent when it answers")
            self._pause_seconds = min(max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        elif self._run is None:
            self.warn(f"does not take this run ({reason}): nothing is logged there")
            self._done = closing or self._drop_all()
        else:
            self.warn(f"does not take a record ({reason}): it is dropped")
            self._pending.popleft()

    def _drop_all(self) -> bool:
        """Take records without sending them until one closes the run; return True then."""
        while not isinstance(self._queue.get(), _Close):
            pass
        return True


def _can_wait(error: Exception) -> bool:
    """Return whether what failed may work later; a file that is gone or an mlflow that is broken will not."""
    return not isinstance(error, FileNotFoundError | ImportError) and is_outage(error)
