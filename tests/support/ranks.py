"""Run a function on several gloo ranks, each in its own process, and collect the results.

The ranks are forks of one process that has imported the libraries, which takes longer than most of the tests.
"""

import gc
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.start import ProcessRank, start, stop
from tests.support.mlflow_store import filled_once

TIMEOUT_SECONDS = 900
GRACE_SECONDS = 10  # for what other ranks have to say of a failed one
ROOT = Path(__file__).parents[2]
# Imported before the ranks are forked.
WARM = (
    "training.trainer",
    "training.build",
    "training.model.kernels.sdpa",
    "tests.support.layouts",
    "torch._dynamo",  # torch's optimizers import it at the first call
    "mlflow.tracking",  # rank 0 imports these in a thread
    "mlflow.store.tracking.sqlalchemy_store",
)


def run_ranks(function: Callable[..., Any], *, ranks: int, arguments: dict[str, Any] | None = None) -> list[Any]:
    """Return the result of `function(process, **arguments)` on each rank.

    Args:
        function: A module-level function; it is imported again by name in each rank.
        ranks: Processes to start.
        arguments: Picklable keyword arguments, the same for all ranks.
    Raises:
        AssertionError: a rank failed; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder_path = Path(folder)
        (folder_path / "call").write_bytes(pickle.dumps((function.__module__, function.__name__, arguments or {})))
        codes = _ask(_nursery(), f"{ranks} {folder}")
        texts = [(folder_path / f"output_{rank}").read_text(errors="replace") for rank in range(ranks)]
        assert not any(codes), "\n".join(f"--- rank {r}:\n{text[-3000:]}" for r, text in enumerate(texts) if codes[r])
        return [pickle.loads((folder_path / f"result_{rank}").read_bytes()) for rank in range(ranks)]


@lru_cache(maxsize=1)
def _nursery() -> "subprocess.Popen[str]":
    """Return the process that forks ranks; it ends when its standard input is closed, as this process ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.ranks"]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _ask(nursery: "subprocess.Popen[str]", request: str) -> list[int]:
    """Let the process fork ranks and return their exit codes."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{request}\n")
    answered, _, _ = select.select([nursery.stdout], [], [], TIMEOUT_SECONDS)
    if not answered:
        nursery.kill()
        _nursery.cache_clear()
    return [int(code) for code in nursery.stdout.readline().split()] or [1]


def start_again(process: ProcessRank, *, number: int) -> None:
    """Leave all process groups and join the other ranks again; number 0 keeps the first groups.

    Call this between two layouts: the gloo threads of all groups at once would starve two cores.
    """
    if number:
        stop()
        start(replace(process, rendezvous=f"{process.rendezvous}_{number}"))


def _rank(folder: Path, *, ranks: int, rank: int) -> None:
    module, name, arguments = pickle.loads((folder / "call").read_bytes())
    process = ProcessRank(
        rank=rank, world_size=ranks, local_rank=rank, rendezvous=f"file://{folder}/meet", starter="local"
    )
    start(process)
    result = getattr(importlib.import_module(module), name)(process, **arguments)
    # A rank that leaves while another one still connects to it breaks the other's start.
    dist.barrier()
    stop()
    (folder / f"result_{rank}").write_bytes(pickle.dumps(result))


def _fork_rank(folder: Path, *, ranks: int, rank: int) -> int:
    """Start a rank with its output in a file, and return its process id."""
    if process := os.fork():
        return process
    output = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["OMP_NUM_THREADS"] = threads = str(max(1, (os.cpu_count() or 1) // ranks))
    torch.set_num_threads(int(threads))
    code = 1
    try:
        _rank(folder, ranks=ranks, rank=rank)
        code = 0
    except BaseException:  # noqa: BLE001  a fork must not run its parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_codes(processes: Sequence[int]) -> list[int]:
    """Return the ranks' exit codes. Once one has failed, the others, which may wait for it for ever, are ended."""
    codes: dict[int, int] = {}
    until = float("inf")
    while len(codes) < len(processes):
        for process in {*processes} - codes.keys():
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process]:
                    until = min(until, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def main() -> None:
    """Fork the ranks of each request on standard input, and answer with their exit codes."""
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # else each fork's first collection would copy every page
    with tempfile.TemporaryDirectory() as home, filled_once(Path(home) / "empty.db"):
        for request in sys.stdin:
            count, folder = request.rstrip("\n").split(" ", 1)
            processes = [_fork_rank(Path(folder), ranks=int(count), rank=rank) for rank in range(int(count))]
            sys.stdout.write(" ".join(map(str, _exit_codes(processes))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
