"""Run a function on several gloo ranks, each in its own process, and collect the results."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.start import ProcessRank, start, stop

TIMEOUT_SECONDS = 900
ROOT = Path(__file__).parents[2]


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
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.support.ranks", folder, str(ranks)]
        outputs = [(folder_path / f"output_{rank}").open("w+") for rank in range(ranks)]
        processes = [
            subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, stdout=output, stderr=output)
            for rank, output in enumerate(outputs)
        ]
        try:
            codes = [process.wait(timeout=TIMEOUT_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
            texts = [(output.seek(0), output.read())[1] for output in outputs]
            for output in outputs:
                output.close()
        assert not any(codes), "\n".join(f"--- rank {r}:\n{text[-3000:]}" for r, text in enumerate(texts) if codes[r])
        return [pickle.loads((folder_path / f"result_{rank}").read_bytes()) for rank in range(ranks)]


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


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), ranks=int(sys.argv[2]), rank=int(sys.argv[3]))
