"""Fixtures that unit tests share: the command line, and a tiny run of one rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch import local
from tests.unit.command_line import Answer, Call, run_here, write_run
from tests.unit.data_samples import write_book

if TYPE_CHECKING:
    from tests.unit.one_rank import OneRank


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[OneRank]":
    """A tiny run whose engine is built once for a file of tests."""
    from tests.unit.one_rank import one_rank  # torch and DeepSpeed, which most tests here need not import

    with one_rank(tmp_path_factory.mktemp("one_rank")) as rank:
        yield rank


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
