"""The process of an export beside training: low priority, no GPU, and no longer life than the rank's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.processes import is_alive, wait_until
from training.export.while_training import LOWEST_PRIORITY, start_export

RANK = """
import sys, time
from pathlib import Path
from training.export.while_training import start_export
print(start_export(["sleep", "600"], Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


def test_it_gives_way_to_the_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_export(["sh", "-c", "env; echo told >&2; exec sleep 600"], log)
    try:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == LOWEST_PRIORITY
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
        assert os.getsid(process.pid) == process.pid, "a terminal's Ctrl-C would end it"
        wait_until(lambda: log.read_text().endswith("told\n"), lambda: "no output")
        assert {"CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"} <= {*log.read_text().splitlines()}
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_it_dies_with_a_killed_rank(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    try:
        with rank.stdout:
            export = int(rank.stdout.readline())
        assert is_alive(export)
    finally:
        rank.kill()
        rank.wait()
    wait_until(lambda: not is_alive(export), lambda: "it lives on")
