"""Fixtures that several tests share."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from launch import local
from tests.support.command_line import Answer, Call, run_here, write_run
from tests.support.data import write_book
from tests.support.mlflow_store import filled_once
from tests.support.small_run import small_run

if TYPE_CHECKING:
    from tests.support.one_rank import OneRank

# The same examples in each run, so that what passes here passes everywhere; others: --hypothesis-profile=default.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Run Triton's kernels in its interpreter, except in the tests of a GPU."""
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C reach the processes that tests start: a shell makes background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _store_filled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let MLflow make its tables once: a second that each new store would take."""
    with filled_once(tmp_path_factory.mktemp("mlflow") / "empty.db"):
        yield


@pytest.fixture(autouse=True)
def _own_verbosity() -> Iterator[None]:
    """Undo what a command line that ran in this process set for all of it: the verbosity, and who shows lines."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what a user or a CI may have set, and what is looked at is what a test sets."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_values(tmp_path: Path) -> dict[str, Any]:
    """Plain values of a valid small run whose folder is the test's own."""
    return small_run({"run": {"dir": str(tmp_path / "run")}})


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[OneRank]":
    """A tiny run whose engine is built once for a file of tests."""
    from tests.support.one_rank import one_rank  # torch and DeepSpeed, which most tests here need not import

    with one_rank(tmp_path_factory.mktemp("one_rank")) as rank:
        yield rank


@pytest.fixture
def trainshort(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run command lines in this process; starting a rank fails the test."""

    def start_ranks(*_: object, **__: object) -> int:
        pytest.fail("a rank was started")

    def call(*arguments: str) -> Answer:
        code = run_here(*arguments)
        return Answer(code, *capsys.readouterr())

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder with a run file and its text; the test's working directory."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_book(tmp_path)
    return tmp_path
