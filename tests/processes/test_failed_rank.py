"""A rank that fails ends at once: no thread, exit handler or communicator delays the end, and so the other ranks'."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import start_ranks
from tests.support.processes import environment, trainshort

# Keeps an interpreter that ends in the usual way for minutes.
BLOCKED = "import atexit, threading, time\natexit.register(time.sleep, 300)\n"
BLOCKED += "threading.Thread(target=time.sleep, args=(300,)).start()\n"
FAILING = f"""{BLOCKED}
import ctypes, logging, sys
from configs.errors import InputError, MachineError
from launch.failure import ending_at_once

logging.basicConfig(stream=sys.stdout)
print("printed", end="")
ctypes.CDLL(None).printf(b" by C")
with ending_at_once():
    logging.warning("logged")
    raise eval(sys.argv[1])
"""
SECONDS = 60


def end_of_two(program: str, logs: Path) -> int:
    """Return the launcher's exit code after two ranks have run a program."""
    command = [sys.executable, "-P", "-c", program]
    metrics = logs / "metrics.jsonl"
    explain = "rank {} {}".format
    return start_ranks(command, ranks=2, logs=logs, environ=environment(), metrics=metrics, explain_memory=explain)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("InputError('two\\n  lines')", 2, "error: two\n  lines\n"),
        ("MachineError('no disk')", 3, "error: no disk\n"),
        ("RuntimeError('boom')", 1, "RuntimeError: boom\n"),
        ("KeyboardInterrupt()", 130, ""),
        ("SystemExit(7)", 7, ""),
        ("SystemExit('words')", 1, "words\n"),
    ],
)
def test_every_error_ends_the_process_at_once(error: str, code: int, words: str) -> None:
    command = [sys.executable, "-P", "-c", FAILING, error]
    done = subprocess.run(
        command,
        env=environment(PYTHONUNBUFFERED=""),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == code
    assert done.stderr.endswith(words)
    assert ("Traceback" in done.stderr) == (code == 1 and words != "words\n")
    assert done.stdout == "printedWARNING:root:logged\n by C"


def test_a_pipe_that_nobody_reads_delays_the_end_only_seconds() -> None:
    code = FAILING.replace("with ending", "import launch.failure\nlaunch.failure.FLUSH_SECONDS = 1\nwith ending")
    command = [sys.executable, "-P", "-c", code, "InputError('x' * 1_000_000)"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=SECONDS) == -signal.SIGALRM


PENDING = """
import os
from launch.failure import ending_at_once

with ending_at_once():
    import torch
    import torch.distributed as dist
    from configs.errors import InputError
    from parallel.start import find_process_rank, start

    process = find_process_rank(os.environ)
    start(process)
    if process.rank == 1:
        dist.barrier()
        raise InputError("rank 1 has no data")
    dist.barrier()
    dist.all_reduce(torch.ones(1))
"""


def test_the_launcher_names_a_rank_that_left_a_collective(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert end_of_two(BLOCKED + PENDING, tmp_path) == 2
    assert time.monotonic() - began < 3 * SECONDS
    assert capfd.readouterr().err == "error: rank 1 has no data\n"


# What `ulimit -v` does, on one of the ranks.
SHORT_OF_MEMORY = """
import os
import resource
from configs.load import load_run
from launch.failure import ending_at_once
from parallel.start import find_process_rank
from training.rank_errors import explain_rank_failure

process = find_process_rank(os.environ)
with ending_at_once(), explain_rank_failure(load_run("demo", overrides=["parallel.pipeline=1"]), process):
    import torch
    import torch.distributed as dist
    from parallel.start import start

    start(process)
    dist.barrier()
    if process.rank == 1:
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 28)
    dist.all_reduce(torch.ones(1))
"""


def test_a_rank_out_of_memory_says_so_and_the_others_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of_two(SHORT_OF_MEMORY, tmp_path) == 3
    first, place, held, limit, *changes = capfd.readouterr().err.splitlines()
    assert first == "error: rank 1 ran out of memory"
    assert place.startswith("  place: tensor rank 1, pipeline rank 0, data rank 0, on ")
    assert re.search(r" [MG]B of address space, and asked for 1.07 GB more$", held)
    assert re.search(r" [MG]B, the address space that ulimit -v allows$", limit)
    assert changes[1:4] == [
        "    train.micro_batch 8 -> 4",
        "    parallel.sequence false -> true",
        "    train.recompute false -> selective or true",
    ]
    assert "Traceback" in (tmp_path / "rank_1.log").read_text()
    other = (tmp_path / "rank_0.log").read_text()
    assert "Traceback" in other
    assert other.splitlines()[-1].startswith("error: rank 0 lost its connection to the other ranks: the cause is in")


BUG = SHORT_OF_MEMORY.partition("    if process")[0] + "    raise KeyError(process.rank)\n"


def test_a_bug_after_the_ranks_have_met_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of_two(BUG, tmp_path) == 1
    said = capfd.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"error: rank ([01]) failed, which is a bug in trainshort: KeyError: \1", said)
    assert "\nTraceback (most recent call last):\n" in "\n" + (tmp_path / f"rank_{said[-1]}.log").read_text()


def test_a_rank_that_cannot_start_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"{BLOCKED}import sys\nsys.modules['torch'] = None")
    rank = {"TRAINSHORT_RANK": "1", "TRAINSHORT_RANKS": "4", "TRAINSHORT_RENDEZVOUS": str(tmp_path / "meet")}
    paths = f"{tmp_path}:{environment()['PYTHONPATH']}"
    done = trainshort(tmp_path, "train", "demo", environment={**environment(**rank), "PYTHONPATH": paths})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of torch halted")
