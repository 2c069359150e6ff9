"""How a run ended whose process was killed before it could tell MLflow, from what is in its folder."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.paths import config_file, incarnation_file, logs_folder, metrics_path, spool_folder
from configs.saved import saved_values
from training.checkpoint.manifest import list_checkpoints
from training.followed_log import ends_in_error
from training.incarnation import has_ended, newest_incarnation, runs_here
from training.tracking.client import OpenRun, TrackingTarget, open_recorded_run, record_run
from training.tracking.events import SENDERS
from training.tracking.record import read_record
from training.tracking.spool import trainer_files

# a process on another machine, which shows its life once a minute, is taken for dead after so long
DEAD_SECONDS = 900.0
_TAIL_BYTES = 20_000  # a traceback


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        status: MLflow's word.
        time_ms: When, in milliseconds since the epoch.
    """

    status: str
    time_ms: int


def ending_of(run_dir: Path) -> Ending | None:
    """Return how the newest start of a run ended; None while it runs, or as far as one can see.

    It is FINISHED if the checkpoint of the last step is there, FAILED if a rank's last word is an error, else KILLED.
    """
    last = last_sign(run_dir)
    if not _is_dead(run_dir, last=last):
        return None
    status = "KILLED"
    if _is_complete(run_dir):
        status = "FINISHED"
    elif _has_failed(run_dir):
        status = "FAILED"
    return Ending(status, int(1000 * last))


def end_if_dead(target: TrackingTarget, run: OpenRun | None, *, ending: Ending | None) -> None:
    """End the run of a folder whose newest start was killed before it could.

    Args:
        target: The store.
        run: The run, if it is open.
        ending: From `ending_of`.
    Raises:
        Exception: any error of MLflow.
    """
    record = read_record(target.run_dir)
    if record is None or not record.is_open or ending is None:
        return
    run = run or open_recorded_run(target)
    SENDERS["ended"](run.client, run.run_id, {"status": ending.status, "time_ms": ending.time_ms})
    record_run(target, run.run_id, is_open=False)


def last_sign(run_dir: Path) -> float:
    """Return when training last wrote something, in seconds since the epoch, by the clock of the disk."""
    checkpoints = [checkpoint.path for checkpoint in list_checkpoints(run_dir)[-1:]]
    files = (incarnation_file(run_dir), metrics_path(run_dir), *checkpoints, *trainer_files(run_dir))
    times = []
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=0.0)


def _is_dead(run_dir: Path, *, last: float) -> bool:
    newest = newest_incarnation(run_dir)
    if newest is None or runs_here(run_dir):
        return False
    return has_ended(run_dir) or _disk_time(run_dir) - last > DEAD_SECONDS


def _disk_time(run_dir: Path) -> float:
    """Return the time by the clock of the disk, which may be another machine's."""
    with suppress(OSError):
        file = spool_folder(run_dir) / ".lock"
        os.utime(file)
        return file.stat().st_mtime
    return time.time()


def _is_complete(run_dir: Path) -> bool:
    try:
        steps = saved_values(config_file(run_dir))["train"]["steps"]
    except (OSError, ValueError, KeyError):
        return False
    checkpoints = list_checkpoints(run_dir)
    return bool(checkpoints) and isinstance(steps, int) and checkpoints[-1].step >= steps


def _has_failed(run_dir: Path) -> bool:
    """Return whether the last word of a rank's log of the newest start is an error."""
    for log in logs_folder(run_dir).glob("rank_*.log"):
        with suppress(OSError), log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
            is_new = log.stat().st_mtime >= incarnation_file(run_dir).stat().st_mtime
            if is_new and ends_in_error(lines):
                return True
    return False
