"""Run pytest in copies of the code, each in a fork of one process that has imported the libraries already.

Importing libraries takes most of a small test's time. `python -m tests.mutants.forks FOLDER...`: each folder holds a
copy of the code and a file of test ids when standard input ends, and receives pytest's output and exit code.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest

# With the plugins of other packages, such as trio's. Imported in a fork, it would not find who refers to objects that
# gc.freeze has hidden, and warn of it.
from hypothesis import Phase, settings

AT_ONCE = 2
IDS, SAID, CODE = "mutant_ids", "mutant_said", "mutant_code"
PROJECT = ("configs", "parallel", "data_pipeline", "training", "launch", "tests")
# Import these before forking; main drops the project's own modules again.
WARM = (
    "launch.cli",
    "parallel.engine",
    "training.model.single",
    "training.export.run",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.t5.modeling_t5",
    "matplotlib.pyplot",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
)


def forget_project() -> None:
    """Drop the project's modules, so that each fork imports those of its copy; the libraries stay."""
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]


def run_copy(folder: Path, *, house: str) -> int:
    """Run a copy's tests in this process, which is a fork; return pytest's exit code."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != house)]
    said = os.open(folder / SAID, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    ids = (folder / IDS).read_text(encoding="utf-8").splitlines()
    # Asserts stay as they are compiled: rewriting them in each copy takes longer than most of the tests.
    plain = ("--assert=plain", f"--basetemp={folder / 'temporary'}")
    return pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *plain, *ids], plugins=[Unshrunk()])


class Unshrunk:
    """A plugin that keeps a failing example as it is found: to look for a simpler one takes seconds."""

    def pytest_configure(self) -> None:
        """Change hypothesis's settings after tests/conftest.py, before tests are imported."""
        settings.register_profile("unshrunk", settings.default, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("unshrunk")


def main(folders: list[Path]) -> None:
    """Run all copies, at most AT_ONCE at a time."""
    house = str(Path(__file__).parents[2])
    for name in WARM:
        importlib.import_module(name)
    forget_project()
    gc.freeze()  # else each fork's first collection would copy every page
    assert sys.stdin.read(), "the copies, which are made meanwhile, were not"
    running: dict[int, Path] = {}

    def finish_one() -> None:
        process, status = os.wait()
        (running.pop(process) / CODE).write_text(str(os.waitstatus_to_exitcode(status)))

    for folder in folders:
        if len(running) == AT_ONCE:
            finish_one()
        if (process := os.fork()) == 0:
            code = run_copy(folder, house=house)
            sys.stdout.flush()
            os._exit(code)  # skip cleanup: unloading the libraries takes as long as a test
        running[process] = folder
    while running:
        finish_one()


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
