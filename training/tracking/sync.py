"""Send what an ended process has left in a run folder's spool, and end its MLflow run truly."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from configs.paths import metrics_path
from parallel.start import environment
from training.checkpoint.manifest import list_checkpoints
from training.incarnation import died_here
from training.tracking.client import OpenRun, TrackingTarget, open_recorded_run, record_run
from training.tracking.events import SENDERS
from training.tracking.record import RunRecord, read_record
from training.tracking.replay import FILE_LANE, LOG_LANE, Refusal, Replay
from training.tracking.spool import Event, SpoolPosition, read_events, spool_files
from training.tracking.store import Store, choose_store, recorded_store


def target_of_folder(run_dir: Path, *, uri: str | None) -> TrackingTarget | None:
    """Return the store of the MLflow run that a folder has begun; None if it has begun none.

    Args:
        run_dir: The run folder.
        uri: Value of `track.uri`, perhaps without its password.
    """
    record = read_record(run_dir)
    if record is None:
        start = newest_start(run_dir)
        if start is None:
            return None
        if start["uri"] is None:  # no store was named then
            return TrackingTarget(run_dir, choose_store(uri, run_dir=run_dir, variables=environment()))
        record = RunRecord("", start["uri"])
    store: Store = recorded_store(record, uri=uri, run_dir=run_dir, variables=environment())
    return TrackingTarget(run_dir, store)


def newest_start(run_dir: Path) -> Event | None:
    """Return the newest start in a folder's spool; None if there is none."""
    for file in reversed(spool_files(run_dir)):
        with suppress(OSError):
            starts = [event for event, _ in read_events(file, SpoolPosition()) if event["kind"] == "start"]
            if starts:
                return starts[-1]
    return None


def send_rest(target: TrackingTarget, *, on_refusal: Callable[[Refusal], None]) -> None:
    """Send all that waits in a folder's spool, then end the run if its process was killed.

    Raises:
        Exception: any error of MLflow.
    """
    replay = Replay(target, own=None, on_refusal=on_refusal)
    for lane in (LOG_LANE, FILE_LANE):
        replay.send(lane)
    end_if_dead(target, replay.run)


def end_if_dead(target: TrackingTarget, run: OpenRun | None) -> None:
    """End the run of a folder whose newest start was killed before it could.

    Args:
        target: The store.
        run: The run, if it is open.
    Raises:
        Exception: any error of MLflow.
    """
    record = read_record(target.run_dir)
    if record is None or not record.is_open or not died_here(target.run_dir):
        return
    run = run or open_recorded_run(target)
    event = {"status": "KILLED", "time_ms": last_sign_ms(target.run_dir)}
    SENDERS["ended"](run.client, run.run_id, event)
    record_run(target, run.run_id, is_open=False)


def end_dead_runs(target: TrackingTarget) -> None:
    """End the runs beside a run folder whose processes on this machine were killed before they could.

    They are logged to the same store. A run on another machine is left alone: from here nobody sees whether it lives.
    """
    for folder in sorted(target.run_dir.absolute().parent.iterdir()):
        record = read_record(folder)
        beside = TrackingTarget(folder, target.store)
        if record is not None and record.is_open and record.uri == beside.recorded_uri and died_here(folder):
            with suppress(Exception):  # an outage shows at the next event of this run
                send_rest(beside, on_refusal=lambda _: None)


def last_sign_ms(run_dir: Path) -> int:
    """Return when a run last wrote a step or a checkpoint, in milliseconds since the epoch."""
    times = [path.stat().st_mtime for path in (metrics_path(run_dir), *spool_files(run_dir)) if path.exists()]
    times += [checkpoint.path.stat().st_mtime for checkpoint in list_checkpoints(run_dir)[-1:]]
    return int(1000 * max(times, default=run_dir.stat().st_mtime))
