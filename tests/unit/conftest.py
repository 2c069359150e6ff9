"""Fixtures of tests of one function or class. None of these tests starts a process, so all run in seconds."""

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.command_line import prepare_here

STARTERS = ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")


def refuse_process(*_: Any, **__: Any) -> NoReturn:
    """Fail a test that starts a process, even if the product starts it and catches errors."""
    pytest.fail("a process was started: such a test belongs in tests/processes")


@pytest.fixture(autouse=True, scope="package")
def _no_process() -> Iterator[None]:
    platform.processor()  # starts `uname` once; the answer is kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse_process)
        for name in STARTERS:
            patch.setattr(os, name, refuse_process)
        for module in ("training.folder", "training.evaluation.provenance", "training.reproduction.here"):
            patch.setattr(f"{module}.source_code", lambda: None)  # asks git
        yield


@pytest.fixture(scope="package")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and data that the command line prepared; tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_here(folder)
    return folder
