"""Fixtures of the tests that speak to the command line."""

from pathlib import Path

import pytest

from launch import local
from tests.unit.command_line import Answer, Call, run_here, write_run
from tests.unit.data_samples import write_book


@pytest.fixture
def trainshort(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """One command line in this process, which may start no rank."""

    def start_ranks(*_: object, **__: object) -> int:
        pytest.fail("a rank was started")

    def call(*arguments: str) -> Answer:
        code = run_here(*arguments)
        return Answer(code, *capsys.readouterr())

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, where the test works: a run file and its text."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_book(tmp_path)
    return tmp_path
