"""Remove run folders: all that speaks against it is checked before the first file goes."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, MachineError
from configs.paths import chain_file, config_file, incarnation_file
from configs.saved import saved_values
from launch.runs import RunSummary, find_runs, is_run_folder, summarize_run
from training.incarnation import newest_incarnation, runs_here, sole_launcher
from training.tracking.record import RunRecord, read_record


@dataclass(frozen=True)
class Removal:
    """One run folder that may be removed, and what its removal leaves.

    Attributes:
        summary: What the folder shows of its run.
        unseen: What may still use the folder and cannot be seen from here; None if nothing can.
        kept: The data in the folder that other runs train on; None if there is no such run.
        users: Those runs.
        data: The data elsewhere that the run trains on; None for data in its folder.
        record: Its MLflow run; None if it has none.
    """

    summary: RunSummary
    unseen: str | None
    kept: Path | None
    users: tuple[Path, ...]
    data: Path | None
    record: RunRecord | None


def plan_removals(folders: Sequence[Path]) -> list[Removal]:
    """Check run folders that shall be removed, and change nothing.

    Raises:
        InputError: one is no run folder, a link, in use, or holds other runs or the current folder.
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
        MachineError: the disk refuses.
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
    if not folder.is_dir():
        raise InputError(f"run folder {folder} {'is a file' if folder.is_file() else 'does not exist'}: check the path")
    if not is_run_folder(folder):
        raise InputError(f"{folder} is no run folder: only what `trainshort runs` lists is removed")
    if runs_here(folder):
        start = newest_incarnation(folder)
        pid = f" (process {start.pid})" if start else ""
        raise InputError(f"{folder} runs here{pid}: stop it first, with Ctrl-C or touch {folder / 'STOP'}")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} holds the current folder: start the command from elsewhere")
    inner = [run for run in find_runs(folder) if run != folder]
    if inner:
        raise InputError(f"{folder} holds another run, {inner[0]}: move or remove that first")


def _plan(folder: Path, *, removed: Sequence[Path]) -> Removal:
    summary = summarize_run(folder)
    own = folder / "data"
    data = _data_of(folder)
    users = tuple(run for run in _neighbours(folder) if run.resolve() not in removed and _data_of(run) == own.resolve())
    return Removal(
        summary=summary,
        unseen=_unseen(folder, summary=summary),
        kept=own if users else None,
        users=users,
        data=data if data != own.resolve() else None,
        record=read_record(folder),
    )


def _unseen(folder: Path, *, summary: RunSummary) -> str | None:
    start = newest_incarnation(folder)
    if summary.state not in ("unknown", "submitted"):
        return None
    if chain_file(folder).is_file():
        return f"its SLURM jobs may still wait or run: see trainshort jobs status {folder}"
    return f"it was started on {start.host} at {start.started_at}, and may still run there" if start else None


def _neighbours(folder: Path) -> list[Path]:
    """Return the runs that may share data with a run: those beside it and in ./runs."""
    places = {place.resolve() for place in (folder.parent, Path("runs")) if place.is_dir()}
    return sorted({run.resolve() for place in places for run in find_runs(place)} - {folder.resolve()})


def _data_of(run_dir: Path) -> Path:
    """Return the folder that a run's data is in; a relative `data.dir` is taken from the current folder."""
    try:
        named = saved_values(config_file(run_dir)).get("data", {}).get("dir")
    except (OSError, ValueError):
        named = None
    return (Path(os.path.expandvars(str(named))).expanduser() if named else run_dir / "data").resolve()
