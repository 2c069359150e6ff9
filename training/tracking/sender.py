"""Send a run folder's spool to MLflow from a background thread that never blocks training and never raises."""

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from configs.commands import typed_path
from configs.figures import counted
from configs.paths import spool_folder
from configs.secrets import hide_secrets
from parallel.start import environment
from training.tracking.client import TrackingTarget, import_client
from training.tracking.ending import end_if_dead, ending_of
from training.tracking.failures import advice_on, may_pass, reason_of
from training.tracking.replay import FILE_LANE, LOG_LANE, Refusal, Replay
from training.tracking.spool import TRAINS, SpoolWriter
from training.tracking.sync import end_dead_runs, waiting_records

_logger = logging.getLogger(__name__)

# one request for all metrics of this period: a request per step would hold the interpreter lock too often
_BATCH_SECONDS = 2.0
# pauses between retries double from the first one up to this
_LONGEST_PAUSE_SECONDS = 300.0
# how long an outage may last once training has ended, and the pause between retries then
_CLOSING_SECONDS, _CLOSING_PAUSE_SECONDS = 5.0, 0.5
# how often a process that writes nothing else shows that it is alive
_LIFE_SECONDS = 60.0


@dataclass
class _Lane:
    """What is sent apart from the rest.

    Attributes:
        name: As `Replay` knows it.
        pause_seconds: Between retries; 0 while the server answers.
        due_at: When to send next, by the monotonic clock.
        is_refused: Whether the last error was one that does not pass.
        is_done: Whether nothing is to be sent once the tracker is closed.
    """

    name: str
    pause_seconds: float = 0.0
    due_at: float = 0.0
    is_refused: bool = False
    is_done: bool = False


class Sender:
    """The background thread of one process. It sends the events of all processes of the run folder."""

    def __init__(
        self,
        target: TrackingTarget,
        *,
        attached: bool,
        is_offline: bool,
        first_pause_seconds: float,
    ) -> None:
        """Build it; `start` starts it.

        Args:
            target: Where it sends to.
            attached: Whether this process adds to the run of another one.
            is_offline: Whether it only shows that the process is alive.
            first_pause_seconds: Pause before the first retry when the server does not answer.
        """
        role = "added" if attached else TRAINS
        self.writer = SpoolWriter(target.run_dir, role=role, on_problem=self.warn)
        self._target, self._attached, self._is_offline = target, attached, is_offline
        self._first_pause_seconds = first_pause_seconds
        self._replay = Replay(target, own=self.writer, on_refusal=self._report_refusal)
        self._lanes = (_Lane(LOG_LANE), _Lane(FILE_LANE))
        self._wakes, self._closes = threading.Event(), threading.Event()
        self._closing_until: float | None = None
        self._warned: set[str] = set()  # set by either thread
        self._swept = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(self) -> None:
        """Start the thread, which imports mlflow: it takes seconds."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Send now, if the server answers."""
        self._wakes.set()

    def close(self) -> None:
        """Send what is left, try for a few seconds if the server does not answer, and end the thread."""
        self.writer.close()
        self._closes.set()
        self._wakes.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end of the thread; return whether it has ended."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def warn(self, problem: str) -> None:
        """Log a warning once per kind: one per failed request would flood training's log."""
        kind = problem.partition(" (")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            text = f"MLflow at {self._target.store.public_uri} {problem}"
            _logger.warning("%s", self._without_secrets(text))

    def say_what_waits(self) -> None:
        """Say at the end which events are lost with this process, and which wait in the spool, and what sends them."""
        run_dir = self._target.run_dir
        folder = spool_folder(run_dir)
        if lost := len(self.writer.waiting()):
            verb = "is" if lost == 1 else "are"
            _logger.warning("%s for MLflow %s lost: %s could not be written", counted(lost, "record"), verb, folder)
        if waiting := waiting_records(run_dir):
            what = f"{counted(waiting, 'record')} for MLflow {'waits' if waiting == 1 else 'wait'}"
            _logger.info("%s in %s: `trainshort track sync %s` sends them", what, folder, typed_path(run_dir))

    def _run(self) -> None:
        if not self._is_offline:
            with suppress(ImportError):  # reported when the first event is sent
                import_client()
        shown_at = time.monotonic()
        while not all(lane.is_done for lane in self._lanes):
            self._wakes.wait(_CLOSING_PAUSE_SECONDS if self._closes.is_set() else _BATCH_SECONDS)
            if not self._closes.is_set():
                self._wakes.clear()
            if time.monotonic() - shown_at > _LIFE_SECONDS:
                self.writer.show_life()
                shown_at = time.monotonic()
            self._send()

    def _send(self) -> None:
        closes = self._closes.is_set()
        for lane in self._lanes:
            if not self._is_due(lane, closes=closes):
                continue
            try:
                is_all = self._replay.send(lane.name)
            except Exception as error:  # noqa: BLE001  no error of MLflow may reach training
                self._handle_error(error, lane)
                if lane.name == LOG_LANE:  # the other lane would only wait for the same server
                    files = self._lanes[-1]
                    files.is_done, files.due_at = lane.is_done, lane.due_at
                    break
                continue
            lane.pause_seconds, lane.is_refused = 0.0, False
            lane.is_done = closes and (is_all or self._is_too_late())
        if all(lane.pause_seconds == 0.0 for lane in self._lanes):
            self._sweep(closes=closes)
        if closes and not all(lane.is_done for lane in self._lanes):
            time.sleep(_CLOSING_PAUSE_SECONDS)

    def _is_due(self, lane: _Lane, *, closes: bool) -> bool:
        if closes and (self._is_offline or self._lanes[0].is_refused):
            lane.is_done = True
        return not (lane.is_done or self._is_offline) and (closes or time.monotonic() >= lane.due_at)

    def _sweep(self, *, closes: bool) -> None:
        """End runs whose process was killed: at first those beside this one, or before the end the one added to."""
        if self._swept or (self._attached and not closes) or self._replay.run is None:
            return
        self._swept = True
        with suppress(Exception):  # an outage shows at the next event of this run
            if self._attached:
                end_if_dead(self._target, self._replay.run, ending=ending_of(self._target.run_dir))
            else:
                end_dead_runs(self._target)

    def _is_too_late(self) -> bool:
        """Return whether the end has waited long enough, which begins to count now."""
        self._closing_until = self._closing_until or time.monotonic() + _CLOSING_SECONDS
        return time.monotonic() >= self._closing_until

    def _handle_error(self, error: Exception, lane: _Lane) -> None:
        """Pause after an error; what was not sent stays in the spool."""
        closes = self._closes.is_set()
        passes = may_pass(error)
        reason, advice = reason_of(error), advice_on(error, store=self._target.store)
        if passes or lane.name == FILE_LANE:
            what = "cannot be reached" if lane.name == LOG_LANE else "takes no files"
            until = f"the records wait in {spool_folder(self._target.run_dir)} until it does"
            continues = "" if self._attached else "training continues, and "
            self.warn(f"{what} ({reason}): {continues}{until}; {advice}")
        else:
            self.warn(f"refuses this run ({reason}): nothing is logged there; {advice}")
        lane.pause_seconds = min(max(2 * lane.pause_seconds, self._first_pause_seconds), _LONGEST_PAUSE_SECONDS)
        if not passes:
            lane.pause_seconds = _LONGEST_PAUSE_SECONDS
        lane.due_at = time.monotonic() + lane.pause_seconds
        lane.is_refused = not passes
        if closes:
            lane.is_done = lane.is_refused or self._is_too_late()

    def _report_refusal(self, refusal: Refusal) -> None:
        reason, advice = reason_of(refusal.error), advice_on(refusal.error, store=self._target.store)
        self.warn(f"refuses a record ({reason}): it is dropped; {advice}")

    def _without_secrets(self, text: str) -> str:
        return hide_secrets(text, known=self._target.store.secrets(environment()))
