"""Two live starts of one run, and starts in other layouts: the result is that of one unbroken run."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.data import write_book
from tests.support.processes import PATIENCE_SECONDS, command, environment, metrics, run
from training.checkpoint.manifest import check_whole, list_checkpoints

STEPS = 24
SAVED_AND_MEASURED = (
    "data.split=0.1",
    f"train.decay_steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.keep=100",
    "evaluate.every=4",
    "evaluate.samples=8",
)
BACKGROUND = ("checkpoint.background=true",)
ONE_RANK = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=1")
EXACT = ("step", "learning_rate", "tokens_seen", "consumed_samples")
MEASURED = ("loss", "grad_norm", "validation_loss")


def sets(run_dir: str, *more: str) -> list[str]:
    return [*SAVED_AND_MEASURED, f"run.dir={run_dir}", *more]


def run_well(folder: Path, name: str, run_dir: str, *more: str) -> None:
    done = run(folder, name, *sets(run_dir, *more))
    assert done.returncode == 0, done.stderr


def start(folder: Path, run_dir: str, name: str) -> "subprocess.Popen[str]":
    """Start one rank as a scheduler would: without the launcher, which refuses a second start on its machine."""
    place = {"TRAINSHORT_RANK": "0", "TRAINSHORT_RANKS": "1", "TRAINSHORT_RENDEZVOUS": str(folder / f"meet_{name}")}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command("train", *sets(run_dir, f"train.steps={STEPS}", *BACKGROUND, *ONE_RANK)),
            cwd=folder,
            env=environment(**place),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def wait_until(true: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.002)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that commands run in; the data are prepared."""
    write_book(tmp_path)
    run_well(tmp_path, "prepare", "run")
    return tmp_path


@pytest.mark.faults
def test_a_superseded_start_ends_itself_and_leaves_one_run(folder: Path) -> None:
    """The older start is suspended in its fifth step, the newer one takes over, and the older one resumes."""
    older = start(folder, "run", "older")
    try:
        wait_until(lambda: len(metrics(folder / "run")) >= 5, (folder / "older.log").read_text)
        older.send_signal(signal.SIGSTOP)
        newer = start(folder, "run", "newer")
        try:
            wait_until(
                lambda: (
                    json.loads((folder / "run" / "incarnation").read_text())["number"] == 2
                    and len(metrics(folder / "run")) >= 8
                ),
                (folder / "newer.log").read_text,
            )
            older.send_signal(signal.SIGCONT)
            assert newer.wait(timeout=PATIENCE_SECONDS) == 0, (folder / "newer.log").read_text()
        finally:
            newer.kill()
        assert older.wait(timeout=PATIENCE_SECONDS) == 3, (folder / "older.log").read_text()
    finally:
        older.kill()
    log = (folder / "older.log").read_text()
    assert "run was started again on " in log
    assert "this older start (1-" in log
    assert "Traceback" not in log
    run_well(folder, "train", "unbroken", f"train.steps={STEPS}", *ONE_RANK)
    for key in (*EXACT, *MEASURED):
        assert [line.get(key) for line in metrics(folder / "run")] == [
            line.get(key) for line in metrics(folder / "unbroken")
        ], key
    saved = [check_whole(checkpoint.path).step for checkpoint in list_checkpoints(folder / "run")]
    assert set(saved) >= set(range(2, STEPS + 1, 2))
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.faults
def test_a_run_resumes_in_any_layout_as_if_nothing_changed(folder: Path) -> None:
    """Schedule, order of samples, validation and metrics through the command line, each start in another layout."""
    layouts = [
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1"),
        ("parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=3", "train.micro_batch=4"),
        ("parallel.tensor=2", "parallel.pipeline=1", "parallel.zero=2", "parallel.offload=cpu"),
    ]
    for number, layout in enumerate(layouts, start=1):
        run_well(folder, "train", "run", f"train.steps={number * STEPS // len(layouts)}", *layout)
    run_well(folder, "train", "unbroken", f"train.steps={STEPS}", *ONE_RANK)
    changed, unbroken = metrics(folder / "run"), metrics(folder / "unbroken")
    for key in EXACT:
        assert [line[key] for line in changed] == [line[key] for line in unbroken], key
    for key in MEASURED:
        seen = [line[key] for line in changed if key in line]
        assert len(seen) == STEPS // (4 if key == "validation_loss" else 1)
        assert seen == pytest.approx([line[key] for line in unbroken if key in line], rel=1e-5), key
