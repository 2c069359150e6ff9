"""Read metrics.jsonl, in which a crash or a bad disk may leave torn and damaged lines. Imports no torch."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import metrics_path
from training.step_columns import StepColumns

STEP_TIMES = ("step_seconds", "validation_seconds", "save_seconds")  # what the time of a run is made of
_END_BYTES = 1 << 20  # a run of months has hundreds of megabytes


def read_steps(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the fields of each step in metrics.jsonl; a torn or damaged line is skipped, and no file holds no step.

    Raises:
        InputError: the file cannot be read.
    """
    return (fields for line in _lines(run_dir) if (fields := step_fields(line)))


def steps_before_first(run_dir: Path) -> int:
    """Return the steps before the first one in metrics.jsonl: of a branch, those that another run has taken."""
    with suppress(InputError):
        return int(next(read_steps(run_dir), {"step": 1})["step"]) - 1
    return 0


def newest_step(run_dir: Path) -> dict[str, Any]:
    """Return the fields of the last whole line of metrics.jsonl; empty if there is none in the file's last megabyte.

    Raises:
        InputError: the file cannot be read.
    """
    lines = reversed([*_lines(run_dir, last_bytes=_END_BYTES)])
    return next((fields for line in lines if (fields := step_fields(line))), {})


def newest_values(run_dir: Path, field: str) -> list[float]:
    """Return the values of a field in the last megabyte of metrics.jsonl; without those that are not finite.

    Raises:
        InputError: the file cannot be read.
    """
    # most lines lack such a field: to look for its name first is ten times as fast
    lines = (line for line in _lines(run_dir, last_bytes=_END_BYTES) if f'"{field}"'.encode() in line)
    return StepColumns([field], (fields for line in lines if (fields := step_fields(line)))).known(field)


def step_fields(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a whole line of metrics.jsonl, which ends in a line break; None for any other line."""
    try:
        fields = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or type(fields.get("step")) is not int:
        return None
    return fields if isinstance(fields.get("loss", 0.0), int | float) else None


def _lines(run_dir: Path, *, last_bytes: int | None = None) -> Iterator[bytes]:
    path = metrics_path(run_dir)
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            for line in file:
                yield from line.splitlines(keepends=True)  # damage may hold other ends of lines
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): fix its permissions") from None
