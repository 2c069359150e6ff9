"""Run the real command line in new processes, mostly on a quick run, and read the metrics it writes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.ranks import ROOT
from tests.support.small_run import QUICK, SHARED_DATA, overrides_of, set_options, small_run

PROGRAM = (sys.executable, "-P", "-m", "trainshort")
PATIENCE_SECONDS = 600
# Fields of metrics.jsonl except times and memory: identical runs agree in them to the last bit.
EXACT = ("step", "loss", "grad_norm", "validation_loss", "learning_rate", "tokens_seen", "consumed_samples")


def trainshort(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder to its end."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def quick(name: str, *overrides: str) -> list[str]:
    """Return the arguments of a command on the quick run, with further overrides."""
    values = overrides_of(small_run(QUICK, SHARED_DATA))
    return [name, "demo", *set_options([*values, *overrides])]


def command(name: str, *overrides: str) -> list[str]:
    """Return the whole command line of a command on the quick run."""
    return [*PROGRAM, *quick(name, *overrides)]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with the project on PYTHONPATH and more variables."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def run(folder: Path, name: str, *overrides: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a command on the quick run, with more environment variables."""
    return trainshort(folder, *quick(name, *overrides), environment=environment(**more))


def wait_until(
    true: Callable[[], Any], what: Callable[[], str], *, seconds: float = PATIENCE_SECONDS, pause_seconds: float = 0.1
) -> None:
    """Wait until a condition is true, or fail with the message of `what`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(pause_seconds)


def is_alive(pid: int) -> bool:
    """Return whether a process runs: one that has ended may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; none where there is no such file yet."""
    file = run_dir / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def exact(run_dir: Path) -> list[list[Any]]:
    """Return each step's fields in which identical runs agree; the run must have ended."""
    assert (run_dir / "metrics.jsonl").read_text().endswith("\n"), f"{run_dir} ends in a torn line"
    return [[line.get(key) for key in EXACT] for line in metrics(run_dir)]
