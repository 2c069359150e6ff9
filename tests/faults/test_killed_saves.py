"""A process is killed at each file operation of a save: a resumed run equals an unbroken one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.disk import counted_operations
from tests.support.one_rank import STEPS, OneRank, one_rank
from tests.support.ranks import ROOT
from training.checkpoint.manifest import check_whole, list_checkpoints

BEFORE = 2
MOST_OPERATIONS = 200


def figures(run_dir: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("step", "loss", "grad_norm", "consumed_samples")] for line in lines]


def resumed(rank: OneRank, run_dir: Path, *, unbroken: Path) -> int:
    """Train a run to its end, which must equal the unbroken one; return the step that it resumed from."""
    began = rank.start(run_dir).step
    assert figures(run_dir) == figures(unbroken), run_dir
    folders = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert folders == [f"step_{step:07d}" for step in (STEPS - 1, STEPS)], run_dir
    return began


def kill_saves(home: Path, begun: Path, out: Path, *, steps: int, first: int) -> list[Path]:
    """Return copies of a run folder in which a save was killed, one per operation, beginning with the first given."""
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(home), str(begun), str(out), str(steps), str(first)]
    subprocess.run(
        [sys.executable, "-m", "tests.support.killed_saves", *arguments], env=environment, cwd=ROOT, check=True
    )
    return sorted(out.iterdir())


@pytest.mark.faults
def test_a_save_killed_at_any_operation_loses_only_that_save(tmp_path: Path) -> None:
    home, begun, unbroken = (tmp_path / name for name in ("home", "begun", "unbroken"))
    home.mkdir()
    with one_rank(home) as rank:
        rank.start(unbroken)
        rank.start(begun, steps=BEFORE)
        killed = kill_saves(home, begun, tmp_path / "out", steps=BEFORE + 1, first=1)
        assert 50 < len(killed) < MOST_OPERATIONS
        newest: set[int] = set()
        for run_dir in killed:
            saved = [check_whole(checkpoint.path).step for checkpoint in list_checkpoints(run_dir)]
            newest.add(saved[-1])
            assert resumed(rank, run_dir, unbroken=unbroken) == saved[-1], run_dir
    assert newest == {BEFORE, BEFORE + 1}


@pytest.mark.faults
def test_a_replacement_killed_at_any_operation_loses_only_itself(tmp_path: Path) -> None:
    home, begun, unbroken = (tmp_path / name for name in ("home", "begun", "unbroken"))
    home.mkdir()
    with one_rank(home) as rank:
        rank.start(unbroken)
        rank.start(begun, steps=BEFORE)
        broken = begun / "checkpoints" / f"step_{BEFORE:07d}"
        weights = next(broken.glob("*.weight.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        shutil.copytree(begun, tmp_path / "counted")
        with counted_operations() as names:
            rank.start(tmp_path / "counted", steps=BEFORE)
        # Before the first rename this is a save like any other.
        first = names.index("rename") + 1
        killed = kill_saves(home, begun, tmp_path / "out", steps=BEFORE, first=first)
        assert len(killed) == len(names) - first + 1
        for run_dir in killed:
            assert resumed(rank, run_dir, unbroken=unbroken) in (BEFORE - 1, BEFORE), run_dir
