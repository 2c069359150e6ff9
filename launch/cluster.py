"""What SLURM says of its partitions and jobs, asked with its own commands."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from configs.errors import InputError, MachineError
from configs.schema import Slurm
from configs.times import time_limit_seconds

UNKNOWN = "UNKNOWN"
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    UNKNOWN,
)


@dataclass(frozen=True)
class Job:
    """A submitted job, as SLURM knows it.

    Attributes:
        number: SLURM's number of it.
        state: SLURM's word, as in RUNNING; UNKNOWN where SLURM has forgotten it.
        reason: Why it waits or ended so; empty where there is none.
        restarts: How often it was queued again.
        exit_code: Of its script.
        nodes: Where it runs or ran.
        seconds_left: To its time limit; None where it does not run or has no limit.
    """

    number: str
    state: str
    reason: str = ""
    restarts: int = 0
    exit_code: int = 0
    nodes: str = ""
    seconds_left: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it neither runs nor waits."""
        return self.state in ENDED


def ask(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run one of SLURM's commands.

    Raises:
        MachineError: it is not on this machine.
    """
    path = shutil.which(program)
    if path is None:
        raise MachineError(f"{program} is not on this machine: run this on a SLURM login node")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what a failed command of SLURM complained about, in one line."""
    lines = [re.sub(r"^.*?error: (Batch job submission failed: )?", "", line) for line in done.stderr.splitlines()]
    return "; ".join(" ".join(line.split()) for line in lines if line.strip()) or f"exit code {done.returncode}"


def find_job(number: str) -> Job:
    """Return a job's state: of slurmctld while it remembers the job, else of the accounting."""
    done = ask("scontrol", "--oneliner", "show", "job", number)
    if done.returncode == 0 and done.stdout.startswith("JobId="):
        return job_of(done.stdout)
    if "Invalid job id" not in done.stderr:
        raise MachineError(f"SLURM does not answer: {said(done)}: try again, or ask your administrator")
    if shutil.which("sacct"):
        done = ask("sacct", "-nXPD", "-j", number, "-o", "State,ExitCode,NodeList")
        rows = [line.split("|") for line in done.stdout.splitlines() if line]
        if done.returncode == 0 and rows:
            state, code, nodes = rows[-1]
            return Job(number, state.split()[0], restarts=len(rows) - 1, exit_code=int(code.split(":")[0]), nodes=nodes)
    return Job(number, UNKNOWN)


def job_of(line: str) -> Job:
    """Return a job from a line of `scontrol --oneliner show job`."""
    fields = _fields(line)
    state, reason = fields["JobState"], fields.get("Reason", "None")
    limit, ran = time_limit_seconds(fields.get("TimeLimit", "")), time_limit_seconds(fields.get("RunTime", ""))
    return Job(
        number=fields["JobId"],
        state=state,
        reason="" if reason == "None" else reason.replace("_", " "),
        restarts=int(fields.get("Restarts", 0)),
        exit_code=int(fields.get("ExitCode", "0:0").split(":")[0]),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        seconds_left=max(0, limit - (ran or 0)) if state == "RUNNING" and limit else None,
    )


def check_limits(slurm: Slurm, *, nodes: int) -> None:
    """Refuse what the partition can never give: sbatch accepts some of it, and the job then waits for ever.

    Raises:
        InputError: names each limit that is exceeded.
    """
    done = ask("scontrol", "--oneliner", "show", "partition")
    partitions = {fields["PartitionName"]: fields for fields in map(_fields, done.stdout.splitlines()) if fields}
    if done.returncode or not partitions:
        return  # sbatch says it better
    default = next((name for name, fields in partitions.items() if fields.get("Default") == "YES"), None)
    name = slurm.partition or default
    if name is None or any(part not in partitions for part in name.split(",")):
        seen = f"slurm.partition {name!r} is not on this cluster" if name else "this cluster has no default partition"
        raise InputError(f"{seen}: set slurm.partition to {' or '.join(sorted(partitions))}")
    if "," not in name:  # of several partitions SLURM takes the one that fits
        found = list(_exceeded(slurm, nodes=nodes, partition=partitions[name], name=name))
        if found:
            raise InputError("; ".join(found))


def _exceeded(slurm: Slurm, *, nodes: int, partition: dict[str, str], name: str) -> Iterator[str]:
    counts = [int(partition[key]) for key in ("TotalNodes", "MaxNodes") if partition.get(key, "").isdigit()]
    if counts and nodes > min(counts):
        yield f"--nodes {nodes} is more than partition {name} gives a job ({min(counts)}): use {min(counts)} or fewer"
    limit, asked = time_limit_seconds(partition.get("MaxTime", "")), time_limit_seconds(slurm.time)
    if limit and asked and asked > limit:
        yield f"slurm.time {slurm.time} is over the limit of partition {name}: use {partition['MaxTime']} or less"
    done = ask("sinfo", "--noheader", f"--partition={name}", "--format=%m")
    memory = [int(text) for text in re.findall(r"^\d+", done.stdout, re.MULTILINE)]
    if slurm.memory and memory and _megabytes(slurm.memory) > max(memory):
        yield (
            f"slurm.memory {slurm.memory} is more than a node of partition {name} has ({max(memory)}M): "
            f"use {max(memory)}M or less"
        )


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", line))


def _megabytes(text: str) -> int:
    return int(text[:-1]) * {"M": 1, "G": 1024, "T": 1024 * 1024}[text[-1]]
