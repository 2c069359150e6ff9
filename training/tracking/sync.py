"""Send what other processes have left in the spool of a run folder, and end its MLflow run as it has ended."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError, MachineError, TrainshortError
from configs.figures import counted
from configs.paths import config_file
from configs.saved import saved_values
from configs.secrets import hide_secrets
from parallel.start import environment
from training.incarnation import died_here
from training.tracking.client import TrackingTarget, set_mlflow_defaults
from training.tracking.ending import end_if_dead, ending_of
from training.tracking.failures import advice_on, may_pass, reason_of
from training.tracking.record import RunRecord, read_record
from training.tracking.replay import FILE_LANE, LOG_LANE, Refusal, Replay
from training.tracking.spool import Event, SpoolPosition, read_events, spool_files
from training.tracking.store import Store, choose_store, default_store, recorded_store

# how often an error that may pass is met without anything being sent, and the pause then
_TRIES, _PAUSE_SECONDS = 3, 1.0


@dataclass(frozen=True)
class Synced:
    """What was sent of a run folder.

    Attributes:
        run_dir: The run folder.
        store: Where to, without secrets.
        run_id: Its MLflow run.
        sent: Events that were sent.
        refused: Why MLflow did not take some events, which were dropped.
        status: The run's status there.
        is_open: Whether the run was not ended: it trains, or that cannot be seen from here.
    """

    run_dir: Path
    store: str
    run_id: str
    sent: int
    refused: tuple[str, ...]
    status: str
    is_open: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {**vars(self), "run_dir": str(self.run_dir), "refused": list(self.refused)}


def sync_runs(folders: Sequence[Path]) -> tuple[list[Synced], dict[Path, TrainshortError]]:
    """Send the spools of run folders; return what was sent of each, and the errors of `sync_run` of the others."""
    synced, problems = [], dict[Path, TrainshortError]()
    for folder in folders:
        try:
            synced.append(sync_run(folder))
        except (InputError, MachineError) as error:  # the other folders may have another store
            problems[folder] = error
    return synced, problems


def has_begun(run_dir: Path) -> bool:
    """Return whether a folder holds an MLflow run, or what begins one."""
    return read_record(run_dir) is not None or _newest_start(run_dir) is not None


def sync_run(run_dir: Path) -> Synced:
    """Send all that waits in a run folder's spool, and end its MLflow run if its process was killed.

    Raises:
        InputError: the folder has begun no MLflow run, or the store refuses it.
        MachineError: the store cannot be reached, or takes no files; what was not sent stays in the spool.
    """
    set_mlflow_defaults()
    target = target_of_folder(run_dir, uri=_configured_uri(run_dir))
    if target is None:
        raise InputError(f"{run_dir} holds nothing for MLflow: name the folder of a run that has trained")
    refused: list[str] = []
    secrets = target.store.secrets(environment())
    replay = Replay(target, own=None, on_refusal=lambda refusal: refused.append(reason_of(refusal.error)))
    try:
        _send_patiently(target, replay)
        return _synced(target, replay, refused=[hide_secrets(text, known=secrets) for text in refused])
    except (InputError, MachineError):
        raise
    except Exception as error:  # noqa: BLE001  any of MLflow, of its database driver and of the network
        said = f"{reason_of(error)}): {_left(replay)}{advice_on(error, store=target.store)}"
        passes = may_pass(error)
        text = f"MLflow at {target.store.public_uri} {'cannot take' if passes else 'refuses'} {run_dir} ({said}"
        raise (MachineError if passes else InputError)(hide_secrets(text, known=secrets)) from None


def target_of_folder(run_dir: Path, *, uri: str | None) -> TrackingTarget | None:
    """Return the store of the MLflow run that a folder has begun; None if it has begun none.

    Args:
        run_dir: The run folder.
        uri: Value of `track.uri`, perhaps without its password.
    """
    record = read_record(run_dir)
    if record is None:
        start = _newest_start(run_dir)
        if start is None:
            return None
        if start["uri"] is None:  # no store was named then
            return TrackingTarget(run_dir, choose_store(uri, run_dir=run_dir, environ=environment()))
        record = RunRecord("", start["uri"])
    store: Store = recorded_store(record, uri=uri, run_dir=run_dir, environ=environment())
    return TrackingTarget(run_dir, store)


def waiting_records(run_dir: Path) -> int:
    """Return how many records in a folder's spool were not sent; 0 if it cannot be read. Imports no mlflow."""
    with suppress(OSError):
        return Replay(TrackingTarget(run_dir, default_store(run_dir)), own=None, on_refusal=lambda _: None).waiting()
    return 0


def send_rest(target: TrackingTarget, *, on_refusal: Callable[[Refusal], None]) -> None:
    """Send all that waits in a folder's spool, then end the run if its process was killed.

    Raises:
        Exception: any error of MLflow.
    """
    _send_all(target, Replay(target, own=None, on_refusal=on_refusal))


def end_dead_runs(target: TrackingTarget) -> None:
    """End the runs beside a run folder whose processes on this machine were killed before they could.

    They are logged to the same store. A run on another machine is left alone.
    """
    for folder in sorted(target.run_dir.absolute().parent.iterdir()):
        record = read_record(folder)
        beside = TrackingTarget(folder, target.store)
        if record is not None and record.is_open and record.uri == beside.recorded_uri and died_here(folder):
            with suppress(Exception):  # an outage shows at the next event of this run
                send_rest(beside, on_refusal=lambda _: None)


def _send_all(target: TrackingTarget, replay: Replay) -> bool:
    """Send all, and how it ended; return whether no other process sends now."""
    ending = ending_of(target.run_dir)  # before the files that show it are removed
    if not replay.send(LOG_LANE):
        return False
    end_if_dead(target, replay.run, ending=ending)
    return replay.send(FILE_LANE)


def _send_patiently(target: TrackingTarget, replay: Replay) -> None:
    """Send all; where the store takes some of it before an error that may pass, try again."""
    tries, sent = 0, 0
    while True:
        try:
            if _send_all(target, replay):
                return
            error: Exception = MachineError(
                f"another process sends {target.run_dir} to MLflow now: run the command again once it has ended"
            )
        except Exception as failed:
            if not may_pass(failed):
                raise
            error = failed
        tries, sent = (tries + 1 if replay.sent_events == sent else 0), replay.sent_events
        if tries >= _TRIES:
            raise error
        time.sleep(_PAUSE_SECONDS)


def _synced(target: TrackingTarget, replay: Replay, *, refused: list[str]) -> Synced:
    run = replay.opened()
    record = read_record(target.run_dir)
    return Synced(
        run_dir=target.run_dir,
        store=target.store.public_uri,
        run_id=run.run_id,
        sent=replay.sent_events,
        refused=tuple(dict.fromkeys(refused)),
        status=run.client.get_run(run.run_id).info.status,
        is_open=bool(record and record.is_open),
    )


def _left(replay: Replay) -> str:
    with suppress(OSError):
        waiting = replay.waiting()
        return f"{counted(waiting, 'record')} {'waits' if waiting == 1 else 'wait'} in the run folder; "
    return ""


def _newest_start(run_dir: Path) -> Event | None:
    for file in reversed(spool_files(run_dir)):
        with suppress(OSError):
            starts = [event for event, _ in read_events(file, SpoolPosition()) if event["kind"] == "start"]
            if starts:
                return starts[-1]
    return None


def _configured_uri(run_dir: Path) -> str | None:
    """Return `track.uri` of the run file in a run folder; None if there is none."""
    with suppress(OSError, ValueError):
        uri = saved_values(config_file(run_dir)).get("track", {}).get("uri")
        return uri if isinstance(uri, str) else None
    return None
