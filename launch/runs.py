"""Find the runs below a folder and tell how far each is, from its files alone: no torch, no SLURM, no MLflow.

A folder may hold hundreds of runs, and a run's metrics.jsonl a hundred megabytes: only its end is read.
"""

import math
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from configs.errors import InputError
from configs.path_text import require_folder
from configs.paths import (
    MANIFEST_NAME,
    chain_file,
    config_file,
    frozen_config,
    incarnation_file,
    metrics_path,
    own_data_folder,
    slurm_folder,
    study_file,
)
from configs.saved import NotYamlError, saved_values
from training.checkpoint.manifest import CheckpointFolder, list_checkpoints
from training.incarnation import Incarnation, has_ended, newest_incarnation, runs_here
from training.metrics_reader import newest_step, newest_values
from training.tracking.record import read_record, record_file
from training.tracking.spool import has_told_end

DEPTH = 3
HEAD_BYTES = 1 << 12
# Folders of a run, which hold no other runs: data may have a million files, slurm/ and tracking/ copy the run file.
SKIPPED = {"data", "checkpoints", "evaluation", "export", "exports", "logs", "slurm"}
SKIPPED |= {"mlartifacts", "profile", "tracking"}

# in a manifest, as JSON writes it
_VALIDATION_LOSS = re.compile(rb'"validation_loss": ([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)[,}]')

RunState = Literal["running", "finished", "stopped", "failed", "submitted", "prepared", "new", "unknown", "broken"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run folder shows of its run.

    Attributes:
        path: The run folder.
        name: `run.name`; None if the folder has no readable run file yet.
        state: `unknown` was started on another machine, so it cannot be seen from here whether it runs; `stopped` has
            saved its last step, `failed` has not; `broken` has a file that cannot be read.
        host: Machine of the newest start; None if it was never started.
        step: Last step in metrics.jsonl or of a checkpoint.
        steps: Steps of the whole run; None if unknown.
        loss: Loss of the last step in metrics.jsonl; a diverged run may have nan.
        best_validation: Lowest validation loss of the checkpoints and of the last megabyte of metrics.jsonl.
        checkpoints: Number of checkpoints.
        newest_checkpoint: Step of the newest one.
        bytes: Size of all files; what links lead to does not count.
        written_at: When a file was last written; None if the folder cannot be read.
        problem: What cannot be read.
    """

    path: Path
    name: str | None = None
    state: RunState
    host: str | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    best_validation: float | None = None
    checkpoints: int = 0
    newest_checkpoint: int | None = None
    bytes: int = 0
    written_at: datetime | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        written_at = self.written_at and self.written_at.isoformat(timespec="seconds")
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None  # JSON has no nan
        return {**vars(self), "path": str(self.path), "loss": loss, "written_at": written_at}


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders at a folder and up to DEPTH levels below it.

    A link to a folder is followed; no folder is read twice.

    Raises:
        InputError: there is no such folder, or it cannot be listed.
    """
    require_folder(folder, what="folder", advice="give the folder of your runs, as in `trainshort runs FOLDER`")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"folder {folder} cannot be listed (Permission denied): fix its permissions")
    runs: list[Path] = []
    level, real_paths = [folder], set[str]()
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for place in level:
            if (real := os.path.realpath(place)) not in real_paths:
                real_paths.add(real)
                runs += [place] if is_run_folder(place) or _has_broken_run_file(place) else []
                below += _folders_in(place)
        level = below
    # A folder without a run file that holds runs is theirs: its data is what they share.
    return sorted(run for run in runs if config_file(run).exists() or not any(run in other.parents for other in runs))


def is_run_folder(path: Path) -> bool:
    """Return whether a run was prepared, submitted, started or saved in a folder; a checkpoint is not a run folder."""
    marks = [incarnation_file(path), chain_file(path)]
    try:
        if not study_file(path).is_file():  # a study's data and MLflow run are those of its runs
            marks += [record_file(path), own_data_folder(path) / MANIFEST_NAME]
        if any(mark.is_file() for mark in marks) or list_checkpoints(path):
            return True
        # a checkpoint holds a run file too, and so does the folder of a submission
        if (path / MANIFEST_NAME).exists() or path == slurm_folder(path.parent):
            return False
        return bool(saved_values(config_file(path)))
    except (OSError, ValueError):
        return False


def _has_broken_run_file(path: Path) -> bool:
    file = config_file(path)
    try:
        saved_values(file)
    except OSError:
        return os.path.isfile(metrics_path(path))  # not Path.is_file: the folder may be closed to this user
    except NotYamlError:
        return True
    except ValueError:  # YAML without a run is another program's
        return False
    return False


def summarize_run(path: Path) -> RunSummary:
    """Return what a run folder shows of its run; a file that is broken or cannot be read makes it `broken`."""
    try:
        return _summarize(path)
    except OSError as error:
        problem = f"{error.filename or path} cannot be read ({error.strerror})"
        return RunSummary(path=path, state="broken", problem=problem)


def _summarize(path: Path) -> RunSummary:
    problems: list[str] = []
    checkpoints = list_checkpoints(path)
    values = run_values(path, problems)
    last, validations = _read_metrics(path, problems)
    start = newest_incarnation(path)
    if start is None and incarnation_file(path).exists():
        problems.append(f"{incarnation_file(path)} cannot be read")
    saved = checkpoints[-1].step if checkpoints else 0
    steps = values.get("train", {}).get("steps")
    validations += [loss for checkpoint in checkpoints for loss in _validation_of(checkpoint)]
    size, written = size_and_time(path)
    step = max(last.get("step", 0), saved)
    state = state_of(path, start=start, step=step, saved=saved, steps=steps if isinstance(steps, int) else None)
    return RunSummary(
        path=path,
        name=name_of(values),
        state="broken" if problems and state != "running" else state,
        host=str(start.host) if start else None,
        step=step,
        steps=steps if isinstance(steps, int) else None,
        loss=last.get("loss"),
        best_validation=min(validations, default=None),
        checkpoints=len(checkpoints),
        newest_checkpoint=saved if checkpoints else None,
        bytes=size,
        written_at=datetime.fromtimestamp(written, UTC),
        problem=problems[0] if problems else None,
    )


def _folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder that may hold runs, real ones before links."""
    try:
        with os.scandir(folder) as entries:
            folders = [entry for entry in entries if entry.name not in SKIPPED and not entry.name.startswith(".")]
            folders = [entry for entry in folders if entry.is_dir()]
    except OSError:
        return []
    return [folder / entry.name for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name))]


def state_of(path: Path, *, start: Incarnation | None, step: int, saved: int, steps: int | None) -> RunState:
    """Return the state of a run.

    Args:
        path: The run folder.
        start: The newest start; None if there was none.
        step: The last step that is known of.
        saved: Step of the newest checkpoint, or 0.
        steps: Steps of the whole run; None if unknown.
    """
    if runs_here(path):
        return "running"
    if steps is not None and saved >= steps:
        return "finished"
    if start is None:
        if step:
            return "stopped"  # trained by a version that recorded no starts
        if chain_file(path).is_file():
            return "submitted"
        return "prepared" if (own_data_folder(path) / MANIFEST_NAME).is_file() else "new"
    if not has_ended(path) and not reported_end(path):
        return "unknown"
    return "stopped" if 0 < step == saved else "failed"


def reported_end(path: Path) -> bool:
    """Return whether the newest start has logged its end to MLflow: the record is closed, and later than the start.

    While MLflow cannot be reached, the spool holds the end.
    """
    if has_told_end(path):
        return True
    record = read_record(path)
    if record is None or record.is_open:
        return False
    return record_file(path).stat().st_mtime >= incarnation_file(path).stat().st_mtime


def run_values(path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return the sections of the run file that the newest start wrote, else of the submitted one; empty if none.

    Append to `problems` why one cannot be read.
    """
    file = next((file for file in (config_file(path), frozen_config(path)) if file.exists()), None)
    if file is None:
        return {}
    try:
        return saved_values(file)
    except OSError as error:
        problems.append(f"{file} cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{file} {error}")
    return {}


def name_of(values: dict[str, dict[str, Any]]) -> str | None:
    """Return `run.name` of the sections of a run file; None if there is none, or if it is not text."""
    name = values.get("run", {}).get("name")
    return name if isinstance(name, str) else None


def _read_metrics(path: Path, problems: list[str]) -> tuple[dict[str, Any], list[float]]:
    """Return the last step in metrics.jsonl, empty if there is none, and the validation losses of the file's end."""
    try:
        return newest_step(path), newest_values(path, "validation_loss")
    except InputError as error:
        problems.append(str(error))
        return {}, []


def _validation_of(checkpoint: CheckpointFolder) -> list[float]:
    """Return the validation loss that a checkpoint's manifest holds near its beginning, if it was measured."""
    try:
        with (checkpoint.path / MANIFEST_NAME).open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return []
    return [float(number) for number in _VALIDATION_LOSS.findall(head)[:1]]


def size_and_time(path: Path) -> tuple[int, float]:
    """Return the bytes of all files below a folder, and when one was last written, in seconds since the epoch."""
    size, written = 0, path.stat().st_mtime
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                state = os.lstat(os.path.join(folder, name))
            except OSError:
                continue  # removed meanwhile
            size, written = size + state.st_size, max(written, state.st_mtime)
    return size, written
