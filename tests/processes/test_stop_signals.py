"""A rank that is asked to stop while it still imports, and again when it has ended."""

import subprocess
import sys

STARTING = """
import os, signal
from parallel.start import hold_stop_signals, ignore_stop_signals

hold_stop_signals()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
import torch, torch.distributed as dist
from pathlib import Path
from unittest.mock import Mock
from parallel.axes import Group
from training.stopping import StopRequest

request = StopRequest()
before = request.asked
request.listen(announce=True)
print(before, request.asked)
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(2):
    CPU, world = torch.device("cpu"), Group(rank=0, size=1, handle=dist.group.WORLD)
    print(request.any_rank_asked(fence=Mock(run_dir=Path("/none")), reads_folder=True, world=world, device=CPU))

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

ignore_stop_signals()
late = Late()  # deleted when Python has dropped its handlers
"""


def test_a_signal_during_imports_counts_and_one_at_exit_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False True\nalive\nTrue\nTrue\n"), done.stderr
    assert done.stderr == "asked by SIGINT to stop\n", "once, however often it is asked, and not by the handler"
