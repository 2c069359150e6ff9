"""RUN_DIR/averaged.json: which checkpoints the weights of a run folder are the mean of. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_json
from configs.paths import average_file


def write_origins(run_dir: Path, origins: Sequence[dict[str, Any]]) -> None:
    """Write what an average was made from: a path, a run, a step and the hash of a manifest each."""
    write_json(average_file(run_dir), {"checkpoints": origins})


def averaged_steps(run_dir: Path) -> tuple[int, ...]:
    """Return the steps of the checkpoints that a run folder is the mean of; none if it is no mean.

    Raises:
        InputError: the file cannot be read.
    """
    return tuple(step for step, _ in _origins(run_dir))


def averaged_checkpoints(run_dir: Path) -> tuple[Path, ...]:
    """Return the places of these checkpoints when they were averaged.

    Raises:
        InputError: the file cannot be read.
    """
    return tuple(path for _, path in _origins(run_dir))


def _origins(run_dir: Path) -> list[tuple[int, Path]]:
    file = average_file(run_dir)
    if not file.is_file():
        return []
    try:
        return [(int(each["step"]), Path(each["path"])) for each in json.loads(file.read_bytes())["checkpoints"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} cannot be read ({error}): average the checkpoints again") from None


def mean_of_steps(steps: Sequence[int]) -> str:
    """Return what an average is, in words."""
    return f"the mean of {len(steps)} checkpoints, of steps {', '.join(f'{step:,}' for step in steps)}"
