"""What a checkpoint that a run file names is called: by its run and its step. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from training.checkpoint.manifest import is_checkpoint_name


def named_step(path: Path) -> int | None:
    """Return the step of a checkpoint by its folder's name, which need not exist; None for another folder."""
    return int(path.name.removeprefix("step_")) if is_checkpoint_name(path.name) else None


def named_run(path: Path) -> Path:
    """Return the run folder of a checkpoint by its folder's name; another folder is one itself."""
    return path if named_step(path) is None else path.parent.parent


def checkpoint_title(path: Path, *, runs: Mapping[Path, str]) -> str | None:
    """Return how a checkpoint or a run folder is called; None if its run is not among some.

    Args:
        path: Its place, resolved; it need not exist.
        runs: Names of runs by their folders, resolved.
    """
    name, step = runs.get(named_run(path)), named_step(path)
    return name if name is None or step is None else f"{name} at step {step:,}"
