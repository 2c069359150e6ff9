"""What SLURM says of its partitions and jobs, asked with its own commands."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
SHORT = {"-N": "--nodes", "-p": "--partition", "-q": "--qos", "-t": "--time"}


@dataclass(frozen=True)
class Job:
    """A submitted job, as SLURM knows it.

    Attributes:
        number: SLURM's number of it.
        state: SLURM's word, as in RUNNING; UNKNOWN where SLURM has forgotten it.
        reason: Why it waits or ended so; empty where there is none.
        restarts: How often it was queued again.
        exit_code: Of its script.
        signal: That ended its script; 0 where none did.
        nodes: Where it runs or ran.
        seconds_left: To its time limit; None where it does not run or has no limit.
    """

    number: str
    state: str
    reason: str = ""
    restarts: int = 0
    exit_code: int = 0
    signal: int = 0
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


def find_job(number: str, *, name: str) -> Job:
    """Return a job's state: of slurmctld while it remembers the job, else of the accounting.

    Args:
        number: SLURM's number of it.
        name: The job's own; a controller that began anew gives the number to another one.
    Raises:
        MachineError: SLURM does not answer.
    """
    done = ask("scontrol", "--oneliner", "show", "job", number)
    known = done.returncode == 0 and done.stdout.startswith("JobId=")
    if not known and "Invalid job id" not in done.stderr:
        raise MachineError(f"SLURM does not answer: {said(done)}: try again, or ask your administrator")
    if known and _fields(done.stdout).get("JobName") == name:
        return job_of(done.stdout)
    if shutil.which("sacct"):
        done = ask("sacct", "-nXPD", "-j", number, "-o", "State,ExitCode,NodeList,JobName")
        rows = [row[:3] for row in (line.split("|", 3) for line in done.stdout.splitlines()) if row[-1] == name]
        if done.returncode == 0 and rows:
            state, ended, nodes = rows[-1]
            code, signal = _exit(ended)
            restarts = len(rows) - 1
            return Job(number, state.split()[0], restarts=restarts, exit_code=code, signal=signal, nodes=nodes)
    return Job(number, UNKNOWN)


def job_of(line: str) -> Job:
    """Return a job from a line of `scontrol --oneliner show job`."""
    fields = _fields(line)
    state, reason = fields["JobState"], fields.get("Reason", "None")
    limit, ran = time_limit_seconds(fields.get("TimeLimit", "")), time_limit_seconds(fields.get("RunTime", ""))
    code, signal = _exit(fields.get("ExitCode", "0:0"))
    return Job(
        number=fields["JobId"],
        state=state,
        reason="" if reason == "None" else reason.replace("_", " "),
        restarts=int(fields.get("Restarts", 0)),
        exit_code=code,
        signal=signal,
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        seconds_left=max(0, limit - (ran or 0)) if state == "RUNNING" and limit else None,
    )


def check_limits(slurm: Slurm, *, nodes: int) -> None:
    """Refuse what the partition can never give: sbatch accepts some of it, and the job then waits for ever.

    Raises:
        InputError: names each limit that is exceeded.
    """
    done = ask("scontrol", "--all", "--oneliner", "show", "partition")
    partitions = {fields["PartitionName"]: fields for fields in map(_fields, done.stdout.splitlines()) if fields}
    if done.returncode or not partitions:
        return  # sbatch says it better
    given = _options(slurm.extra)
    # As sbatch has it: the environment counts more than the script, and there the later line more.
    said_by = {
        "SBATCH_PARTITION": os.environ.get("SBATCH_PARTITION"),
        "slurm.extra": given.get("--partition"),
        "slurm.partition": slurm.partition,
    }
    default = next((name for name, fields in partitions.items() if fields.get("Default") == "YES"), None)
    where, name = next(((where, name) for where, name in said_by.items() if name), ("slurm.partition", default))
    if name is None or any(part not in partitions for part in name.split(",")):
        seen = f"{where} {name!r} is not on this cluster" if name else "this cluster has no default partition"
        raise InputError(f"{seen}: set {where} to {' or '.join(sorted(partitions))}")
    if "," not in name:  # of several partitions SLURM takes the one that fits
        found = list(_exceeded(slurm, nodes=nodes, given=given, partition=partitions[name]))
        if found:
            raise InputError("; ".join(found))


def _exceeded(slurm: Slurm, *, nodes: int, given: dict[str, str], partition: dict[str, str]) -> Iterator[str]:
    """Yield what the partition cannot give, but for what options of one's own decide."""
    name = partition["PartitionName"]
    # A quality of service may lift the partition's limits, but not make nodes.
    lifted = bool(slurm.qos or given.get("--qos") or os.environ.get("SBATCH_QOS"))
    keys = ("TotalNodes",) if lifted else ("TotalNodes", "MaxNodes")
    counts = [int(partition[key]) for key in keys if partition.get(key, "").isdigit()]
    if "--nodes" not in given and counts and nodes > min(counts):
        yield f"--nodes {nodes} is more than partition {name} gives a job ({min(counts)}): use {min(counts)} or fewer"
    limit, asked = time_limit_seconds(partition.get("MaxTime", "")), time_limit_seconds(slurm.time)
    timed = "--time" in given or "SBATCH_TIMELIMIT" in os.environ
    if not lifted and not timed and limit and asked and asked > limit:
        yield f"slurm.time {slurm.time} is over the limit of partition {name}: use {partition['MaxTime']} or less"
    if slurm.memory and not any(option.startswith("--mem") for option in given):
        done = ask("sinfo", "--noheader", f"--partition={name}", "--format=%m")
        memory = [int(text) for text in re.findall(r"^\d+", done.stdout, re.MULTILINE)]
        if memory and _megabytes(slurm.memory) > max(memory):
            yield (
                f"slurm.memory {slurm.memory} is more than a node of partition {name} has ({max(memory)}M): "
                f"use {max(memory)}M or less"
            )


def _options(extra: Sequence[str]) -> dict[str, str]:
    """Return options of sbatch by their long names; of those that are there twice the last one, as sbatch does."""
    words = [word for line in extra for word in line.split()]
    found = {}
    for word, after in pairwise([*words, ""]):
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            found[name] = value if sign else after
        elif word.startswith("-"):
            found[SHORT.get(word[:2], word[:2])] = word[2:] or after
    return found


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", line))


def _exit(text: str) -> tuple[int, int]:
    """Return the exit code and the signal of SLURM's 0:12."""
    code, _, signal = text.partition(":")
    return int(code), int(signal or 0)


def _megabytes(text: str) -> int:
    return int(text[:-1]) * {"M": 1, "G": 1024, "T": 1024 * 1024}[text[-1]]
