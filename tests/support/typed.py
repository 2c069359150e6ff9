"""The real command line as a user types it, on a tiny run, and the metrics that it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import ROOT

PATIENCE_SECONDS = 240
TINY = [
    "model.layers=2",
    "model.hidden=32",
    "model.heads=4",
    "data.sources=[book.txt]",
    "data.dir=data",
    "data.vocab_size=600",
    "data.sequence_length=16",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.warmup_steps=2",
]


def command(name: str, *sets: str) -> list[str]:
    """Return a command on the tiny run, with further overrides."""
    return [sys.executable, "-P", "-m", "trainshort", name, "demo", *(w for s in (*TINY, *sets) for w in ("--set", s))]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, in which trainshort is found, and more."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def run(folder: Path, name: str, *sets: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder to its end."""
    return subprocess.run(
        command(name, *sets),
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]
