"""Files and folders that are closed to the user, as a colleague's may be: each command says so in one line."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.load import load_run
from data_pipeline.manifest import load_prepared
from data_pipeline.samples import open_samples
from tests.support.command_line import Call
from tests.support.run_folders import make_run

NOBODY = 65534
READERS = (
    "train run.yaml --dry-run --set run.dir=runs/a",
    "checkpoint list runs/a",
    "track sync runs/a",
    "jobs status runs/a",
    "watch runs/a --once",
)


@contextmanager
def closed(path: Path, *, mode: int = 0) -> Iterator[None]:
    """Close a file or a folder of the working directory to this process; root may else read everything."""
    before, users = path.stat().st_mode, os.getresuid()
    path.chmod(mode)
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)  # what os.access asks about too
    try:
        yield
    finally:
        os.setresuid(*users)
        path.chmod(before)


@pytest.fixture
def runs(folder: Path, prepared_once: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with prepared data, a run that trains on it and another one."""
    shutil.copytree(prepared_once, folder, dirs_exist_ok=True)
    for name in ("a", "b"):
        make_run(folder / "runs" / name, last=6, saved=(6,))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    # torch sets it to a folder of the user that imports it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    for command in ("check run.yaml", "runs", *READERS):  # what they import is not imported as another user
        trainshort(*command.split())
    return folder


def test_a_closed_run_folder_is_one_line(runs: Path, trainshort: Call) -> None:
    for place, commands in {"runs": READERS, "runs/a": READERS, "runs/a/checkpoints": READERS[:1]}.items():
        with closed(runs / place):
            answers = [trainshort(*command.split()) for command in commands]
        for answer in answers:
            assert answer.code in (2, 3), answer
            assert answer.error.startswith("error: run"), answer
            assert "Permission denied" in answer.error, answer
            assert answer.error.count("\n") == 1, answer


def test_a_closed_folder_hides_no_other_run(runs: Path, trainshort: Call) -> None:
    (runs / "runs" / "private").mkdir()
    with closed(runs / "runs" / "private"):
        listed = trainshort("runs")
    assert listed.code == 0
    assert " a\n" in listed.out
    assert " b\n" in listed.out
    with closed(runs / "runs"):
        answer = trainshort("runs")
    assert (answer.code, answer.error) == (
        2,
        "error: folder runs cannot be listed (Permission denied): fix its permissions\n",
    )


def test_closed_data_is_said_before_any_rank_starts(runs: Path, trainshort: Call) -> None:
    manifest = "data/manifest.json cannot be read (Permission denied): fix its permissions, or set data.dir"
    for place, words in {
        "data": manifest,
        "data/manifest.json": manifest,
        "data/part-000.idx": "prepared data data/part-000.idx cannot be read (Permission denied): fix its permissions",
        "data/part-000.bin": "prepared data data/part-000.bin cannot be read (Permission denied): fix its permissions",
    }.items():
        with closed(runs / place):
            assert f"note: {words}" in trainshort("check", "run.yaml").out
            refusal = trainshort("train", "run.yaml", "--dry-run")
        assert (refusal.code, refusal.error.startswith(f"error: {words}")) == (2, True), refusal


def test_an_index_that_may_not_be_written_is_noted(runs: Path, trainshort: Call) -> None:
    words = "note: the index of samples data/index/{}-32-"
    with closed(runs / "data", mode=0o555):
        assert words.format("training") in trainshort("check", "run.yaml").out
    prepared = load_prepared(load_run("run.yaml").data, folder=runs / "data")
    open_samples(prepared, sequence_length=32, split=0.1, seed=1, held_out=False)
    with closed(runs / "data", mode=0o555):
        assert "note: " not in trainshort("check", "run.yaml").out
        noted = trainshort("check", "run.yaml", "--set", "evaluate.every=5").out
    assert words.format("held-out") in noted
    assert "copy the data to a folder of yours and set data.dir to it" in noted


def test_a_current_folder_that_is_gone_is_one_line(trainshort: Call, folder: Path) -> None:
    (folder / "gone").mkdir()
    run = folder / "run.yaml"
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    for words in (("check", str(run)), ("doctor",), ("runs",), ("checkpoint", "average", str(folder), "--out", "new")):
        answer = trainshort(*words)
        assert (answer.code, answer.out, answer.error) == (
            3,
            "",
            "error: the folder in which this was started does not exist any more: change to one that does\n",
        ), words


def test_a_name_that_is_too_long_is_one_line(trainshort: Call, folder: Path) -> None:
    answer = trainshort("jobs", "status", "a" * 300)
    assert (answer.code, answer.error.count("\n")) == (3, 1)
    assert answer.error.endswith("a cannot be used (File name too long): fix that, or choose another place\n")


def test_a_closed_checkpoint_of_another_run_hinders_no_removal(
    runs: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        away, folder = Path(place) / "away", shutil.copytree(runs, Path(place) / "open")
        Path(place).chmod(0o755)
        (away / "of").mkdir(parents=True)
        make_run(folder / "runs" / "c", f"train.init_from={away}/of/another")
        monkeypatch.chdir(folder)
        with closed(away):
            answer = trainshort("runs", "rm", "runs/a")
        assert "standard input is not a terminal to ask on" in answer.error
        monkeypatch.chdir(runs)
