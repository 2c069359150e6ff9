"""A disk that is full, and one that cannot be written, through the real command line."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.data import write_book
from tests.support.processes import metrics, run
from tests.support.small_run import ONE_RANK, overrides_of
from training.checkpoint.manifest import check_whole, list_checkpoints

STEPS = 14
LARGE_CHECKPOINTS = {
    "model": {"layers": 1, "hidden": 64, "heads": 2},
    "data": {"split": 0},
    "train": {"global_batch": 4, "micro_batch": 4, "steps": STEPS, "warmup_steps": 1},
    "checkpoint": {"every": 1, "keep": 100},
    "evaluate": {"every": 0},
}
MEGABYTES = 9
FITTING = 7  # checkpoints that fit on the small disk, with half of one to spare


def trainshort(command: str, folder: Path, run_dir: Path) -> "subprocess.CompletedProcess[str]":
    # MLflow's database is on another disk: it grows with the first steps, and would change how many checkpoints fit.
    places = (f"run.dir={run_dir}", f"track.uri=sqlite:///{folder}/mlflow.db")
    return run(folder, command, *overrides_of(ONE_RANK, LARGE_CHECKPOINTS), *places, OMP_NUM_THREADS="1")


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True)


def disk_bytes(folder: Path) -> int:
    """Return the space of a folder's files on a tmpfs, which allocates whole pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(-(-path.stat().st_size // page) * page for path in folder.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that commands run in; the data are prepared."""
    write_book(tmp_path)
    assert trainshort("prepare", tmp_path, tmp_path / "elsewhere").returncode == 0
    return tmp_path


def figures(run_dir: Path) -> list[list[Any]]:
    return [[line[key] for key in ("step", "loss", "grad_norm")] for line in metrics(run_dir)]


@pytest.mark.faults
def test_a_full_disk_stops_saves_and_a_larger_one_resumes(folder: Path, disk: Path) -> None:
    unbroken, run_dir = folder / "unbroken", disk / "run"
    assert trainshort("train", folder, unbroken).returncode == 0
    mount("-o", f"remount,size={int((FITTING + 0.5) * disk_bytes(list_checkpoints(unbroken)[-1].path))}", str(disk))
    done = trainshort("train", folder, run_dir)
    assert done.returncode == 3, done.stderr
    assert "NOT SAVED: " in done.stderr
    assert "(No space left on device" in done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {run_dir}/checkpoints/step_{STEPS:07d} was not saved (No space left on device")
    assert re.search(rf"ended without saving: steps {FITTING + 1} to \d+ are lost", done.stderr), done.stderr
    assert done.stderr.splitlines()[-1].startswith("to continue: trainshort train demo ")
    assert "Traceback" not in done.stderr
    saved = [check_whole(checkpoint.path).step for checkpoint in list_checkpoints(run_dir)]
    assert saved == list(range(1, FITTING + 1))
    unsaved = re.findall(r"NOT SAVED: \S+/step_(\d+) was not saved", done.stderr)
    assert [*saved, *map(int, unsaved)] == list(range(1, STEPS + 1)), "each step is saved or reported as not saved"
    # the lines that fit on the disk equal those of the unbroken run
    lines = figures(run_dir)
    assert lines == figures(unbroken)[: len(lines)]
    assert len(lines) >= len(saved)
    mount("-o", f"remount,size={10 * MEGABYTES}m", str(disk))
    assert trainshort("train", folder, run_dir).returncode == 0
    assert figures(run_dir) == figures(unbroken)
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.faults
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_a_read_only_disk_is_reported_in_one_line(folder: Path, disk: Path, begun: bool) -> None:
    run_dir = disk / "run"
    if begun:
        (run_dir / "logs").mkdir(parents=True)
    mount("-o", "remount,ro", str(disk))
    done = trainshort("train", folder, run_dir)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: folder {run_dir}/logs cannot be ")
    assert len(done.stderr.splitlines()) == 1
