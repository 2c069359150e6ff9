"""Commands of a login node start fast: `make test` runs this file while nothing else runs."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# What every command needs; how long it takes is a measure of the machine.
LIBRARIES = (sys.executable, "-P", "-c", "import typer, pydantic, yaml, rich.console")
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
# Runs a command, and says which slow modules it has loaded.
COMMAND = """
import sys, trainshort
try: trainshort.main()
finally:
    heavy = {'torch', 'numpy', 'deepspeed', 'megatron', 'mlflow', 'transformers', 'matplotlib'}
    sys.stderr.write(repr(sorted(heavy & set(sys.modules))))
"""


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return what a child process computes, which other processes on the machine do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def least_seconds() -> float:
    """What a process computes that imports the libraries of every command."""
    return min(cpu_seconds(lambda: subprocess.run(LIBRARIES, check=True)) for _ in range(5))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", "alibi-1b3"),
        ("slurm", "alibi-1b3", "--nodes", "4"),
        ("checkpoint", "list", "."),
        ("runs", str(OLD_RUN.parent)),
        ("watch", str(OLD_RUN)),
        ("checkpoint", "reshape", str(OLD_RUN), "--dry-run"),
    ],
)
def test_login_node_commands_start_fast_and_without_torch(
    arguments: tuple[str, ...], tmp_path: Path, least_seconds: float
) -> None:
    command = [sys.executable, "-P", "-c", COMMAND, *arguments]

    def run() -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
        assert (done.returncode, done.stderr) == (0, "[]")

    assert min(cpu_seconds(run) for _ in range(3)) < 5.5 * least_seconds, "0.7 s, where the libraries take 0.12"
