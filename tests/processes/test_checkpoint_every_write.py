"""The file operations of a save fail, one after the other: only that save is lost.

A save writes dozens of tensors and removes a folder's files, one like the other: here the first and the last of such a
row fail, in `make test-faults` every one.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.disk import OnOperation, counted_operations, from_then_on, once
from tests.support.one_rank import STEPS, OneRank
from training.checkpoint import disk
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.rank_part import SaveError

BEFORE = 2  # steps saved before the disk fails
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "consumed_samples")


@pytest.fixture(scope="module")
def begun(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, so that the next save also removes one."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    rank.start(run_dir, steps=BEFORE)
    return run_dir


@pytest.fixture(scope="module")
def unbroken(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    rank.start(run_dir)
    return figures(run_dir)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(run_dir: Path) -> list[list[Any]]:
    return [[line[key] for key in EXACT] for line in lines(run_dir)]


def steps_of_whole(run_dir: Path) -> list[int]:
    """Return the saved steps, after reading every byte of each checkpoint."""
    return [check_whole(checkpoint.path).step for checkpoint in list_checkpoints(run_dir)]


def unfinished(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


def open_files() -> int:
    """Return how many files and folders of checkpoints this process holds open."""
    links = (handle.path for handle in os.scandir("/proc/self/fd"))
    return sum("/checkpoints" in os.readlink(link) for link in links if os.path.islink(link))


@pytest.fixture(params=["each kind", pytest.param("all", marks=pytest.mark.faults)])
def operations(request: pytest.FixtureRequest, rank: OneRank, begun: Path, tmp_path: Path) -> list[int]:
    """Numbers of the operations of a save that are made to fail."""
    run_dir = tmp_path / "counted"
    shutil.copytree(begun, run_dir)
    with counted_operations() as names:
        rank.start(run_dir, steps=BEFORE + 1)
    assert {"mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir"} <= set(names)
    assert steps_of_whole(run_dir) == [BEFORE, BEFORE + 1]
    return ends_of_rows(names) if request.param == "each kind" else [*range(1, len(names) + 1)]


def ends_of_rows(names: list[str]) -> list[int]:
    """Return the numbers, from 1, of the operations without those that come between two of their own kind."""
    around = zip(["", *names], names, [*names[1:], ""], strict=False)
    return [number for number, three in enumerate(around, start=1) if len(set(three)) > 1]


def start(rank: OneRank, begun: Path, run_dir: Path, fail: OnOperation, *, steps: int) -> list[str]:
    """Train on a disk that fails; return the names of the operations."""
    shutil.copytree(begun, run_dir)
    with counted_operations(fail) as names:
        rank.start(run_dir, steps=steps)
    return names


def test_all_files_are_on_disk_before_the_folder_is_renamed(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync, rename, run_dir = os.fsync, os.rename, tmp_path / "run"

    def synced(handle: int) -> None:
        sync(handle)
        events.append(("synced", os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), run_dir)))

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        events.append(("renamed", os.path.relpath(new, run_dir)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    rank.start(run_dir, steps=1)
    saved = list_checkpoints(run_dir)[0].path
    named = events.index(("renamed", f"checkpoints/{saved.name}"))
    before = {path for event, path in events[:named] if event == "synced"}
    staging = next(path for path in before if path.startswith("checkpoints/.step_"))
    staging = "/".join(staging.split("/")[:2])
    assert before >= {staging, ".", "metrics.jsonl", *(f"{staging}/{path.name}" for path in saved.iterdir())}
    assert ("synced", "checkpoints") in events[named:]
    last_line = max(place for place, event in enumerate(events) if event == ("synced", "metrics.jsonl"))
    assert last_line < named


def test_a_disk_that_takes_one_byte_at_a_time_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:1]))
    entry = disk.write_file(tmp_path / "file", [b"one", memoryview(b"and two")])
    assert (tmp_path / "file").read_bytes() == b"oneand two"
    assert entry == disk.describe_file(tmp_path / "file")


def test_training_continues_whichever_operation_fails(
    rank: OneRank, begun: Path, unbroken: list[list[Any]], operations: list[int], tmp_path: Path
) -> None:
    failed = closes = 0
    for number in operations:
        run_dir = tmp_path / f"run_{number}"
        names = start(rank, begun, run_dir, once(number), steps=STEPS)
        closes += names[number - 1] == "close"
        assert figures(run_dir) == unbroken, number
        assert steps_of_whole(run_dir)[-1] == STEPS, number
        assert unfinished(run_dir) == [], number
        signs = [line.get("failed_saves") for line in lines(run_dir)]
        assert open_files() == closes, number  # only files whose close failed
        assert signs in ([None] * STEPS, [None] * (BEFORE + 1) + [1] * (STEPS - BEFORE - 1)), number
        failed += signs[-1] is not None
        shutil.rmtree(run_dir)
    # the other operations remove an older checkpoint, after the new one is saved
    assert len(operations) - failed < 12


def test_a_disk_that_fails_for_good_leaves_a_whole_checkpoint(
    rank: OneRank,
    begun: Path,
    unbroken: list[list[Any]],
    operations: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    newest: set[int] = set()
    for number in operations:
        run_dir = tmp_path / f"run_{number}"
        error = None
        try:
            start(rank, begun, run_dir, from_then_on(number), steps=BEFORE + 1)
        except SaveError as raised:
            error = raised
        if error is not None:
            assert error.exit_code == 3
            assert str(error).endswith("(Input/output error): free space, or fix the disk")
            assert "NOT SAVED" in caplog.text
        saved = steps_of_whole(run_dir)
        assert saved[-1] >= BEFORE, number
        newest.add(saved[-1])
        assert rank.start(run_dir).step == saved[-1], number
        assert figures(run_dir) == unbroken, number
        assert steps_of_whole(run_dir)[-2:] == [STEPS - 1, STEPS], number
        assert unfinished(run_dir) == [], number
        shutil.rmtree(run_dir)
        caplog.clear()
    assert newest == {BEFORE, BEFORE + 1}


def test_a_step_saved_again_replaces_the_broken_folder(
    rank: OneRank, begun: Path, unbroken: list[list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest checkpoint is altered: a resume skips it, trains its step again and saves it, whatever fails."""
    caplog.set_level(logging.CRITICAL)
    altered = tmp_path / "altered"
    shutil.copytree(begun, altered)
    weights = altered / "checkpoints" / f"step_{BEFORE:07d}" / "stage_00_tensor_00.exp_avg.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copytree(altered, counted_dir := tmp_path / "counted")
    with counted_operations() as names:
        rank.start(counted_dir, steps=BEFORE)
    # before the first rename this is a save like any other
    for number in range(names.index("rename") + 1, len(names) + 1):
        run_dir = tmp_path / f"run_{number}"
        start(rank, altered, run_dir, once(number), steps=BEFORE)
        assert steps_of_whole(run_dir)[-1] == BEFORE, number
        rank.start(run_dir)
        assert figures(run_dir) == unbroken, number
        assert unfinished(run_dir) == [], number
        shutil.rmtree(run_dir)
