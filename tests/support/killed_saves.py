"""Fork one child for each file operation of a save, and kill the child at that operation.

    python -m tests.support.killed_saves HOME BEGUN OUT STEPS FIRST

OUT receives a copy of the run folder BEGUN for each operation from the FIRST on, named run_1 and so on, as the killed
child left it. The parent only imports: threads and process groups do not survive a fork, so a child starts its own.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from tests.support.disk import counted_operations
from tests.support.one_rank import one_rank


def main(home: Path, begun: Path, out: Path, *, steps: int, first: int) -> None:
    """Kill a child at each operation, until a child finishes because its save has fewer operations."""
    for number in count(first):
        run_dir = out / f"run_{number}"
        shutil.copytree(begun, run_dir)
        child = os.fork()
        if child == 0:
            _save(home, run_dir, killed_at=number, steps=steps)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            shutil.rmtree(run_dir)
            return
        assert os.WIFSIGNALED(status), f"the child of operation {number} ended with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL


def _save(home: Path, run_dir: Path, *, killed_at: int, steps: int) -> None:
    def kill(number: int, name: str) -> None:
        if number == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with one_rank(home) as rank, counted_operations(kill):
        rank.start(run_dir, steps=steps)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), steps=int(sys.argv[4]), first=int(sys.argv[5]))
