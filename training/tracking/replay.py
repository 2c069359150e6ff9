"""Send what the spool of a run folder holds to its MLflow run: in order, and each event once."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.paths import spool_folder
from training.tracking.client import OpenRun, TrackingTarget, open_recorded_run, open_run, record_run
from training.tracking.events import LOGGED_STEPS, METRICS_PER_REQUEST, NEED_ARTIFACT_STORE, SENDERS, SENT
from training.tracking.failures import is_about_file, may_pass
from training.tracking.record import read_record
from training.tracking.spool import (
    Event,
    SentPositions,
    SpoolPosition,
    SpoolWriter,
    is_closed,
    read_events,
    remove_kept_file,
    sole_sender,
    spool_files,
)

# The events that need the store of artifacts are sent apart from the others, which do not wait for them.
LOG_LANE, FILE_LANE = "log", "files"
_LEAST_POINTS = 50


@dataclass(frozen=True)
class Refusal:
    """An event that MLflow refuses for good.

    Attributes:
        error: Why.
    """

    error: Exception


@dataclass(frozen=True)
class _Batch:
    """Events that are sent in one request: one event, or metrics that follow each other.

    Attributes:
        file: Name of their file.
        events: The events, oldest first; empty if only events of the other lane follow.
        position: Behind the last of them.
    """

    file: str
    events: list[Event]
    position: SpoolPosition


class Replay:
    """Sends the spool of a run folder.

    Attributes:
        run: The MLflow run once it is open.
    """

    def __init__(
        self, target: TrackingTarget, *, own: SpoolWriter | None, on_refusal: Callable[[Refusal], None]
    ) -> None:
        """Read nothing yet.

        Args:
            target: Where it is sent.
            own: This process's writer, whose events may be in memory.
            on_refusal: Told what was dropped.
        """
        self.run: OpenRun | None = None
        self._target, self._own, self._on_refusal = target, own, on_refusal
        self._positions = SentPositions(target.run_dir)
        self._is_stale = False
        self._most_points = METRICS_PER_REQUEST - 2  # less after an error: a slow server may answer to less
        self.sent_events = 0

    def send(self, lane: str) -> bool:
        """Send all that waits in a lane; return whether nothing is left, False too if another process sends now.

        Raises:
            Exception: any error of MLflow that may pass, or that refuses the run; what is not sent stays in the spool.
        """
        if not spool_folder(self._target.run_dir).is_dir() and not self._in_memory():
            return True
        with sole_sender(self._target.run_dir) as is_sole:
            if not is_sole:
                return False
            self._read_positions()
            try:
                for file in self._files():
                    self._send_file(file, lane=lane)
                self._remove_sent()
            except Exception:
                self._is_stale = True
                raise
            finally:
                self._positions.save()
        return True

    def opened(self) -> OpenRun:
        """Return the run, also if nothing was to be sent.

        Raises:
            Exception: any error of MLflow.
        """
        self.run = self.run or self._open_recorded()
        return self.run

    def waiting(self) -> int:
        """Return how many events wait to be sent."""
        self._read_positions()
        return sum(
            len(batch.events)
            for file in self._files()
            for lane in (LOG_LANE, FILE_LANE)
            for batch in self._batches(file, lane=lane)
        )

    def _read_positions(self) -> None:
        if self._positions.read():  # another process has sent meanwhile
            self._is_stale = True

    def _files(self) -> list[Path]:
        files = spool_files(self._target.run_dir)
        # a file that the disk did not let us make holds nothing, but its events are in memory
        return files if self._own is None or self._own.file in files else [*files, self._own.file]

    def _in_memory(self) -> list[Event]:
        return self._own.waiting() if self._own is not None else []

    def _send_file(self, file: Path, *, lane: str) -> None:
        for batch in self._batches(file, lane=lane):
            # a run opened meanwhile may know more of what was sent
            events = [event for event in batch.events if event["n"] > self._known(file.name, lane=lane)]
            if events:
                self._deliver(file, events)
            self._positions.set(file.name, batch.position, lane=lane)
            if events:
                self.sent_events += len(events)
                self._positions.save()
                for event in events:
                    self._clean(event)
        if self._own is not None and file == self._own.file:
            lanes = (LOG_LANE, FILE_LANE)
            self._own.forget(min(self._positions.of(file.name, lane=each).number for each in lanes))

    def _known(self, file: str, *, lane: str) -> int:
        """Return the number of the last event of a file that was sent, by this folder's note and by the server's."""
        number = self._positions.of(file, lane=lane).number
        if lane == LOG_LANE and self.run is not None and self.run.sent is not None and self.run.sent[0] == file:
            return max(number, self.run.sent[1])
        return number

    def _batches(self, file: Path, *, lane: str) -> Iterator[_Batch]:
        """Yield what waits in a file and is of a lane, metrics together; at last how far it was looked through."""
        events: list[Event] = []
        points, position = 0, self._positions.of(file.name, lane=lane)
        for event, behind in self._events(file, position):
            if (lane == FILE_LANE) != (event["kind"] in NEED_ARTIFACT_STORE):
                position = behind
                continue
            is_metrics = event["kind"] == "metrics"
            size = len(event["values"]) if is_metrics else 0
            if events and (not is_metrics or points + size > self._most_points):
                yield _Batch(file.name, events, position)
                events, points = [], 0
            events.append(event)
            position, points = behind, points + size
            if not is_metrics:
                yield _Batch(file.name, events, position)
                events, points = [], 0
        yield _Batch(file.name, events, position)

    def _events(self, file: Path, position: SpoolPosition) -> Iterator[tuple[Event, SpoolPosition]]:
        last = position
        for event, last in read_events(file, position):
            yield event, last
        if self._own is not None and file == self._own.file:
            for event in self._in_memory():
                if event["n"] > last.number:
                    # not in the file: its place there is known once it is written
                    yield event, SpoolPosition(event["n"], last.offset)

    def _deliver(self, file: Path, events: list[Event]) -> None:
        """Send events; drop one that MLflow refuses.

        Raises:
            Exception: any error of MLflow that may pass, or that refuses the run.
        """
        run = self._open(events[0], file)
        if events[0]["n"] <= self._known(file.name, lane=LOG_LANE) and events[0]["kind"] == "metrics":
            return self._deliver_rest(file, events)
        try:
            self._send_events(run, file, events)
        except Exception as error:
            if may_pass(error) or (events[0]["kind"] in NEED_ARTIFACT_STORE and not is_about_file(error)):
                self._most_points = max(_LEAST_POINTS, self._most_points // 2)
                raise
            if len(events) == 1:
                self._on_refusal(Refusal(error))
            else:  # one of them is refused: find it
                for event in events:
                    self._deliver(file, [event])
        else:
            self._most_points = min(METRICS_PER_REQUEST - 2, 2 * self._most_points)
        return None

    def _deliver_rest(self, file: Path, events: list[Event]) -> None:
        """Send those of some events that the server does not have, after opening the run has shown which."""
        known = self._known(file.name, lane=LOG_LANE)
        rest = [event for event in events if event["n"] > known]
        if rest:
            self._deliver(file, rest)

    def _send_events(self, run: OpenRun, file: Path, events: list[Event]) -> None:
        kind = events[0]["kind"]
        if kind == "metrics":
            self._send_metrics(run, file, events)
            return
        event = {**events[0], "id": _mark(file, events[0])}
        if "path" in event:
            event["path"] = str(self._target.run_dir / event["path"])
        record = read_record(self._target.run_dir)
        if kind == "ended" and not (record and record.is_open):
            return  # rank 0 has ended it
        SENDERS[kind](run.client, run.run_id, event)
        if kind in ("finish", "ended"):
            record_run(self._target, run.run_id, is_open=False)

    def _send_metrics(self, run: OpenRun, file: Path, events: list[Event]) -> None:
        """Log metrics, except those of steps already logged, by this process or before a restart."""
        steps = dict(run.logged_steps)
        points: list[tuple[str, float, int, int]] = []
        for event in events:
            time_ms, step, is_again = event["time_ms"], event["step"], event.get("again", False)
            for key, value in event["values"].items():
                if step is not None and not is_again:
                    if step <= steps.get(key, -1):
                        continue
                    steps[key] = step
                points.append((key, value, time_ms, run.step_at(time_ms) if step is None else step))
        sent = (file.name, events[-1]["n"])
        tags = {SENT: f"{sent[0]} {sent[1]}", LOGGED_STEPS: json.dumps(steps)}
        SENDERS["metrics"](run.client, run.run_id, {"points": points, "tags": tags})
        run.logged_steps, run.sent = steps, sent

    def _open(self, event: Event, file: Path) -> OpenRun:
        """Return the open run; a start opens it as running."""
        if event["kind"] == "start":
            self.run = open_run(self._target, {**event, "id": _mark(file, event)})
        elif self._is_stale and self.run is not None:
            self.run.refresh()
        self._is_stale = False
        return self.opened()

    def _open_recorded(self) -> OpenRun:
        if read_record(self._target.run_dir) is None:  # its record was lost: the start that made it knows
            for file in spool_files(self._target.run_dir):
                for event, _ in read_events(file, SpoolPosition()):
                    if event["kind"] == "start":
                        return open_run(self._target, {**event, "id": _mark(file, event)})
        return open_recorded_run(self._target)

    def _clean(self, event: Event) -> None:
        if "path" in event:
            remove_kept_file(self._target.run_dir / event["path"], run_dir=self._target.run_dir)

    def _remove_sent(self) -> None:
        """Remove files that are sent and have no writer any more."""
        for file in spool_files(self._target.run_dir):
            if not is_closed(file):
                continue
            lanes = (LOG_LANE, FILE_LANE)
            rest = [batch for lane in lanes for batch in self._batches(file, lane=lane) if batch.events]
            if not rest:
                file.unlink(missing_ok=True)
                self._positions.forget(file.name)


def _mark(file: Path, event: Event) -> str:
    """Return what identifies an event among those of all runs."""
    return f"{file.stem}:{event['n']}"
