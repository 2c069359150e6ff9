"""A job of four ranks: a rank is killed, then the launcher; a second start is refused. It ends like an unbroken one.

The killed job writes its checkpoints in the background.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.data import write_book
from tests.support.processes import PATIENCE_SECONDS, command, environment, is_alive, metrics, run

STEPS, RANKS, ENDED_SECONDS = 60, 4, 120


def sets(run_dir: str) -> list[str]:
    saved = ("data.split=0", f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=2", "evaluate.every=0")
    return [*saved, f"checkpoint.background={str(run_dir == 'run').lower()}", f"run.dir={run_dir}"]


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the processes of a launcher's ranks, by rank."""
    ranks = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(word[16:]): int(pid) for word in environment if word.startswith(b"TRAINSHORT_RANK=")})
    return ranks


class Job:
    """A started training, in the middle of a step."""

    def __init__(self, folder: Path, *, after: int) -> None:
        """Start it and wait until it has taken some steps."""
        self.log = folder / "train.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command("train", *sets("run")), cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(metrics(folder / "run")) < after or metrics(folder / "run")[-1]["step"] < after:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "no steps"
            time.sleep(0.01)
        self.ranks = ranks_of(self.process.pid)

    def signal_ranks(self, number: signal.Signals) -> None:
        for pid in self.ranks.values():
            os.kill(pid, number)

    def wait_for_the_ranks(self) -> None:
        deadline = time.monotonic() + ENDED_SECONDS
        while any(is_alive(pid) for pid in self.ranks.values()):
            assert time.monotonic() < deadline, "a rank is left"
            time.sleep(0.05)


@pytest.mark.faults
def test_a_job_with_killed_ranks_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    write_book(tmp_path)
    assert run(tmp_path, "prepare", *sets("run")).returncode == 0

    job = Job(tmp_path, after=3)
    assert sorted(job.ranks) == list(range(RANKS))
    job.signal_ranks(signal.SIGSTOP)  # else the job may end first
    second = run(tmp_path, "train", *sets("run"))
    job.signal_ranks(signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: run is being trained by process {job.ranks[0]} on this machine since ")
    assert len(second.stderr.splitlines()) == 1
    os.kill(job.ranks[2], signal.SIGKILL)
    began = time.monotonic()
    assert job.process.wait(timeout=ENDED_SECONDS) == 3
    assert time.monotonic() - began < ENDED_SECONDS
    said = job.log.read_text()
    assert (
        "error: rank 2 ended with signal 9 (SIGKILL), which the launcher did not send\n  place: tensor rank 0" in said
    )
    assert "  train.micro_batch 2 -> 1\n" in said
    assert "Traceback" not in said
    assert "Connection" not in said
    job.wait_for_the_ranks()
    first = metrics(tmp_path / "run")
    assert 3 <= first[-1]["step"] < STEPS, "the kill came too late to test anything"

    job = Job(tmp_path, after=first[-1]["step"] + 3)
    job.process.kill()
    job.process.wait()
    job.wait_for_the_ranks()
    assert metrics(tmp_path / "run")[-1]["step"] < STEPS, "the kill came too late to test anything"

    third = run(tmp_path, "train", *sets("run"))
    assert third.returncode == 0, third.stderr
    assert run(tmp_path, "train", *sets("unbroken")).returncode == 0
    for key in ("step", "loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert [line[key] for line in metrics(tmp_path / "run")] == [
            line[key] for line in metrics(tmp_path / "unbroken")
        ]
    starts = json.loads((tmp_path / "run" / "incarnation").read_text())["number"]
    assert starts == 3
