"""Remove run folders, after checking everything that forbids it."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.commands import typed_path
from configs.errors import InputError, MachineError
from configs.files import is_in_use
from configs.path_text import require_folder
from configs.paths import (
    chain_file,
    checkpoints_folder,
    config_file,
    incarnation_file,
    own_data_folder,
    started_in,
    stop_file,
)
from launch.runs import RunSummary, find_runs, is_run_folder, reported_end, run_values, size_and_time, summarize_run
from launch.slurm.record import find_jobs, read_chain
from training.averaging.record import averaged_checkpoints
from training.folder import CHECKPOINT_KEYS, with_dotted_keys
from training.incarnation import has_ended, newest_incarnation, runs_here, sole_launcher
from training.tracking.record import RunRecord, read_record
from training.tracking.sync import waiting_records


@dataclass(frozen=True)
class Removal:
    """One run folder that may be removed, and what its removal leaves.

    Attributes:
        summary: What the folder shows of its run.
        unseen: What may still use the folder and cannot be seen from here; None if nothing can.
        searched: Folders in which other runs were looked for that train on data in this one; empty if it holds none.
        kept: The data in the folder that other runs train on; None if there is no such run.
        kept_bytes: Its size.
        users: Those runs.
        successors: Runs that begin with one of its checkpoints, or are a mean of some, found in the same folders.
        data: The data elsewhere that the run trains on; None for data in its folder, or in another that is removed.
        record: Its MLflow run; None if it has none.
        unsent: Number of records that were not sent to MLflow.
    """

    summary: RunSummary
    unseen: str | None
    searched: tuple[Path, ...]
    kept: Path | None
    kept_bytes: int
    users: tuple[Path, ...]
    successors: tuple[Path, ...]
    data: Path | None
    record: RunRecord | None
    unsent: int


def plan_removals(folders: Sequence[Path]) -> list[Removal]:
    """Check run folders before they are removed; change nothing.

    Raises:
        InputError: one is not a run folder, is a link, is in use, has jobs, or holds other runs, the current folder, or
            another run's data in another place than its own data.
    """
    for folder in folders:
        _refuse(folder)
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(folder.resolve(), folder)
    return [_plan(folder, removed=[*unique]) for folder in unique.values()]


def remove_run(removal: Removal) -> None:
    """Remove a run folder; links in it are removed, what they lead to is not.

    Raises:
        InputError: the run was started meanwhile.
        MachineError: a file cannot be removed.
    """
    folder, kept = removal.summary.path, removal.kept
    with sole_launcher(folder):
        _refuse(folder)
        # What marks a run folder goes last: if the removal is cut short, the command removes the rest.
        marks = {config_file(folder).name, incarnation_file(folder).name}
        try:
            for entry in sorted(folder.iterdir(), key=lambda entry: entry.name in marks):
                if entry == kept:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            if kept is None:
                folder.rmdir()
        except OSError as error:
            raise MachineError(
                f"{error.filename or folder} cannot be removed ({error.strerror}): fix that and start the command again"
            ) from None


def _refuse(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(f"{folder} is a link to {folder.resolve()}: name that folder, or remove the link with rm")
    require_folder(folder, what="run folder", advice="check the path")
    if not is_run_folder(folder):
        raise InputError(f"{folder} is not a run folder: only folders that `trainshort runs` lists are removed")
    if runs_here(folder):
        start = newest_incarnation(folder)
        pid = f" (process {start.pid})" if start else ""
        stop = typed_path(stop_file(folder))
        raise InputError(f"{folder} runs here{pid}: stop it first, with Ctrl-C or touch {stop}")
    if is_in_use(checkpoints_folder(folder)):
        raise InputError(
            f"{folder} is being read here, to evaluate or export it: stop that first, with Ctrl-C, or wait for it"
        )
    if chain_file(folder).is_file():
        _slurm_answers(folder)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} contains the current folder: start the command from another one")
    inner = [run for run in find_runs(folder) if run != folder]
    if inner:
        raise InputError(f"{folder} holds another run, {inner[0]}: move or remove that first")


def _plan(folder: Path, *, removed: Sequence[Path]) -> Removal:
    own, data, searched = own_data_folder(folder), _data_of(folder, run_values(folder, [])), _places_beside(folder)
    neighbours = {run.resolve() for place in searched for run in find_runs(place)} - {folder.resolve(), *removed}
    values = {run: run_values(run, []) for run in sorted(neighbours)}
    trained_on = {run: _data_of(run, keys) for run, keys in values.items()}
    users = tuple(run for run, used in trained_on.items() if used == own.resolve())
    for run, used in trained_on.items():
        if run not in users and _is_in(folder, used):
            raise InputError(
                f"{folder} holds data that {run} trains on, {used}: move it and change data.dir there, or remove that "
                "run too"
            )
    successors = (run for run, keys in values.items() if any(_is_in(folder, each) for each in _begins_with(run, keys)))
    return Removal(
        summary=summarize_run(folder),
        unseen=_unseen(folder),
        searched=searched if own.is_dir() else (),
        kept=own if users else None,
        kept_bytes=size_and_time(own)[0] if users and not own.is_symlink() else 0,
        users=users,
        successors=tuple(successors),
        data=None if data == own.resolve() or any(_is_in(each, data) for each in removed) else data,
        record=read_record(folder),
        unsent=waiting_records(folder),
    )


def _unseen(folder: Path) -> str | None:
    if chain_file(folder).is_file() and not _slurm_answers(folder):
        return f"its SLURM jobs may still wait or run: see trainshort jobs status {typed_path(folder)}"
    start, file = newest_incarnation(folder), incarnation_file(folder)
    if start is None:
        return f"{file} cannot be read, so it may run on another machine" if file.exists() else None
    ended = has_ended(folder) or reported_end(folder)
    return None if ended else f"it was started on {start.host} at {start.started_at}, and may still run there"


def _slurm_answers(folder: Path) -> bool:
    """Return whether SLURM can be asked here about a run's jobs.

    Raises:
        InputError: a job runs or waits.
    """
    try:
        jobs = find_jobs(read_chain(folder))
    except (InputError, MachineError):
        return False
    for name, job in jobs.items():
        if not job.ended:
            raise InputError(
                f"{folder} has job {job.job_id} ({name}, {job.state}): end it first, with "
                f"trainshort jobs stop {typed_path(folder)}"
            )
    return True


def _places_beside(folder: Path) -> tuple[Path, ...]:
    """Return the folders in which runs may share data with a run: the one around it, and ./runs."""
    places = (folder.parent, Path("runs"))
    return tuple({place.resolve(): place for place in reversed(places) if place.is_dir()}.values())


def _data_of(run_dir: Path, values: dict[str, dict[str, Any]]) -> Path:
    """Return the folder that the data of a run with these keys is in."""
    named = values.get("data", {}).get("dir")
    return (_place_of(named, run_dir, values) if named else own_data_folder(run_dir)).resolve()


def _begins_with(run_dir: Path, values: dict[str, dict[str, Any]]) -> list[Path]:
    """Return the checkpoints, or their run folders, that a run with these keys begins with or is the mean of."""
    named = map(with_dotted_keys(values).get, CHECKPOINT_KEYS)
    places = [_place_of(path, run_dir, values) for path in named if path]
    with suppress(InputError):  # it cannot be read
        places += averaged_checkpoints(run_dir)
    return places


def _place_of(named: Any, run_dir: Path, values: dict[str, dict[str, Any]]) -> Path:
    """Return the place that a key of a run names.

    A relative path is taken from where the run was started, if `run.dir` tells that and there is such a place, else
    from the current folder.
    """
    path = Path(os.path.expandvars(str(named))).expanduser()
    there = started_in(run_dir, named=str(values.get("run", {}).get("dir"))) / path
    return there if os.path.exists(there) else path.absolute()  # not Path.exists: it may be closed to this user


def _is_in(folder: Path, path: Path) -> bool:
    """Return whether a path leads to a folder or through it, also if its end is a link to another place."""
    return any(place.resolve() == folder.resolve() for place in (path, *path.parents))
