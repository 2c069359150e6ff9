"""The real command line, called in the test's own process: quicker than a new one for each wrong word."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli

VALUES: dict[str, Any] = {
    "run": {"name": "small", "dir": "run"},
    "model": {"layers": 4, "hidden": 64, "heads": 4},
    "data": {"sources": ["book.txt"], "dir": "data", "vocab_size": 600, "sequence_length": 16, "split": 0.1},
    "parallel": {"tensor": 2, "pipeline": 2},
    "train": {"micro_batch": 2, "global_batch": 8, "steps": 10, "learning_rate": 0.001},
}


@dataclass(frozen=True)
class Answer:
    """What a user sees."""

    code: int
    out: str
    error: str


Call = Callable[..., Answer]


def run_here(*arguments: str) -> int:
    """Run one command line and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainshort", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def write_run(folder: Path, **sections: dict[str, Any]) -> None:
    values = {name: {**keys, **sections.get(name, {})} for name, keys in VALUES.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(trainshort: Call, *arguments: str) -> str:
    """Run what must be refused and leave everything as it was; return the one line that says why."""
    before = contents(Path.cwd())
    answer = trainshort(*arguments)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.error.startswith("error: ")
    assert len(answer.error.splitlines()) == 1
    assert contents(Path.cwd()) == before
    return answer.error.removeprefix("error: ").rstrip("\n")
