"""Submit runs with the real command line on the cluster's login node, and watch them."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import PATIENCE_SECONDS, exact, metrics, trainshort, wait_until
from tests.support.small_run import WHOLE_JOB, set_options, small_run

CLUSTER = Path(__file__).parents[1] / "slurm" / "cluster.sh"
VALUES = small_run(
    WHOLE_JOB,
    {
        "run": {"dir": "runs/small"},
        "evaluate": {"samples": 8, "lengths": [128, 2048], "tensor": 2, "pipeline": 2},
        "slurm": {"gpus_per_node": 0, "ranks_per_node": 2, "time": "0:10:00"},
    },
)
STEPS: int = VALUES["train"]["steps"]


def slurm(*command: str) -> str:
    """Run a command that must succeed, and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS).stdout


@dataclass
class Submitted:
    """A submitted run.

    Attributes:
        home: The user's folder, where commands run.
        run_dir: The run folder, relative to it.
    """

    home: Path
    run_dir: str

    @property
    def folder(self) -> Path:
        return self.home / self.run_dir

    def jobs(self, command: str) -> str:
        done = trainshort(self.home, "jobs", command, self.run_dir)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        done = trainshort(self.home, "jobs", "status", self.run_dir, "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def states(self) -> dict[str, str]:
        return {job["name"]: job["state"] for job in self.status()["jobs"]}

    def job(self, name: str = "train") -> str:
        return str(json.loads((self.folder / "slurm" / "jobs.json").read_text())["jobs"][name])

    def field(self, key: str, name: str = "train") -> str:
        """Return a field of `scontrol show job`."""
        line = slurm("scontrol", "--oneliner", "show", "job", self.job(name))
        return line.split(f" {key}=", 1)[1].split(" ", 1)[0]

    def metrics(self) -> list[dict[str, Any]]:
        return metrics(self.folder)

    def exact(self) -> list[list[Any]]:
        return exact(self.folder)

    def log(self, name: str = "train") -> str:
        file = self.folder / "logs" / f"slurm-{name}-{self.job(name)}.log"
        return file.read_text() if file.exists() else ""

    def diagnosis(self) -> str:
        """Return the job table and the logs, to show after a failed wait."""
        ranks = [f"{file}:\n{file.read_text()[-1500:]}" for file in sorted((self.folder / "logs").glob("rank_*.log"))]
        return "\n".join([self.jobs("status"), self.log(), *ranks])

    def wait_for(self, name: str = "train", *, state: str = "COMPLETED", seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until a job is in a state; fail at once if it has ended in another one."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def reached() -> bool:
            seen = self.field("JobState", name)
            assert seen == state or seen not in over, f"{name} is {seen}:\n{self.diagnosis()}"
            return seen == state

        wait_until(reached, self.diagnosis, seconds=seconds)

    def wait_for_line(self, text: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        wait_until(lambda: text in self.log(), self.diagnosis, seconds=seconds)

    def suspend(self, step: int) -> None:
        """Suspend the ranks after a step, so that the next one takes as long as the test wants."""
        wait_until(lambda: len(self.metrics()) >= step, self.diagnosis)
        self._signal_ranks("STOP")

    def wake(self) -> None:
        """Continue the suspended ranks."""
        self._signal_ranks("CONT")

    def kill(self, node: str) -> None:
        """Kill the ranks of a node."""
        self._signal(node, "KILL")

    def _signal_ranks(self, name: str) -> None:
        for node in slurm("scontrol", "show", "hostnames", self.field("NodeList")).split():
            self._signal(node, name)

    def _signal(self, node: str, name: str) -> None:
        # Not with scancel: SLURM records that it suspended a job. The pattern does not match srun and torchrun, whose
        # command lines end in the same words.
        ranks = rf"python[0-9.]* \S*trainshort train {self.run_dir}/"
        slurm(str(CLUSTER), "on", node, "pkill", f"-{name}", "-f", ranks)


def submit(home: Path, name: str, *sets: str, nodes: int = 2, run_dir: str | None = None) -> Submitted:
    """Write a run file and submit it."""
    run_dir = run_dir or f"runs/{name}"
    values = {**VALUES, "run": {"name": name, "dir": run_dir}}
    (home / f"{name}.yaml").write_text(yaml.safe_dump(values))
    done = trainshort(home, "slurm", f"{name}.yaml", "--nodes", str(nodes), "--submit", *set_options(sets))
    assert done.returncode == 0, done.stderr
    return Submitted(home, run_dir)
