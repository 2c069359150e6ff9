"""Run the real command line in the test's own process: much faster than a new process per command."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import run_command_line
from tests.support.data import write_book
from tests.support.small_run import SHARED_DATA, small_run


@dataclass(frozen=True)
class Answer:
    """Output and exit code of a command."""

    code: int
    out: str
    error: str


Call = Callable[..., Answer]


def run_here(*arguments: str) -> int:
    """Run one command line and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainshort", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command_line()
    return int(ended.value.code or 0)


def write_run(folder: Path, **sections: dict[str, Any]) -> None:
    """Write the small run, with some keys of its sections changed, as run.yaml."""
    values = small_run(SHARED_DATA, sections)
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def prepare_here(folder: Path) -> None:
    """Write the small run and its text to a folder, and prepare the data there."""
    with contextlib.chdir(folder):
        write_run(folder)
        write_book(folder)
        assert run_here("prepare", "run.yaml") == 0


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return the bytes of every file below a folder; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(trainshort: Call, *arguments: str) -> str:
    """Run a command that must be refused and change no file; return its one-line error."""
    before = contents(Path.cwd())
    answer = trainshort(*arguments)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.error.startswith("error: ")
    assert len(answer.error.splitlines()) == 1
    assert contents(Path.cwd()) == before
    return answer.error.removeprefix("error: ").rstrip("\n")
