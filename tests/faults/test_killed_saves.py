"""A process is killed at every file operation of a save, one after the other: a resume is the unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.spawn import ROOT
from tests.unit.one_rank import STEPS, one_rank
from training.checkpoint.manifest import check_whole, list_checkpoints

BEFORE = 2
MOST_OPERATIONS = 200


def figures(run_dir: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("step", "loss", "grad_norm", "consumed_samples")] for line in lines]


@pytest.mark.faults
def test_a_save_killed_at_any_file_operation_loses_that_save_alone(tmp_path: Path) -> None:
    home, begun, unbroken, out = (tmp_path / name for name in ("home", "begun", "unbroken", "out"))
    home.mkdir()
    out.mkdir()
    with one_rank(home) as rank:
        rank.start(unbroken)
        rank.start(begun, steps=BEFORE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [str(home), str(begun), str(out), str(BEFORE + 1)]
        subprocess.run(
            [sys.executable, "-m", "tests.faults.killed_saves", *arguments], env=environment, cwd=ROOT, check=True
        )
        killed = sorted(out.iterdir())
        assert 50 < len(killed) < MOST_OPERATIONS
        newest: set[int] = set()
        for run_dir in killed:
            saved = [check_whole(found.path).step for found in list_checkpoints(run_dir)]
            newest.add(saved[-1])
            assert rank.start(run_dir).step == saved[-1], run_dir
            assert figures(run_dir) == figures(unbroken), run_dir
            folders = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            assert folders == [f"step_{step:07d}" for step in (STEPS - 1, STEPS)], run_dir
    assert newest == {BEFORE, BEFORE + 1}
