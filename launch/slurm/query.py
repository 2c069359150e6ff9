"""Ask SLURM about jobs and partitions, with its own commands."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from configs.errors import InputError, MachineError
from configs.rules import time_limit_seconds
from configs.schema import Slurm

UNKNOWN_STATE = "UNKNOWN"  # ours, not SLURM's
END_STATES = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    UNKNOWN_STATE,
)
SHORT_OPTIONS = {"-N": "--nodes", "-p": "--partition", "-q": "--qos", "-t": "--time"}


@dataclass(frozen=True)
class Job:
    """A submitted job, as SLURM knows it.

    Attributes:
        job_id: SLURM's id of the job.
        state: SLURM's word, such as RUNNING; UNKNOWN if SLURM has forgotten the job.
        reason: Why it waits or why it ended; empty if there is no reason.
        restarts: How often it was requeued.
        exit_code: Exit code of its script.
        signal: Signal that ended its script, or 0.
        nodes: Nodes that it runs or ran on.
        seconds_left: Time to its time limit; None if it does not run or has no limit.
    """

    job_id: str
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
        return self.state in END_STATES


def run_slurm(
    program: str, *arguments: str, environ: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run one of SLURM's commands and return its result, failed or not.

    Args:
        program: The command.
        arguments: Its arguments.
        environ: Its environment; this process's by default.
    Raises:
        MachineError: the command is not on this machine.
    """
    path = shutil.which(program)
    if path is None:
        raise MachineError(f"{program} is not on this machine: run this on a SLURM login node")
    # Users write comments and names in other encodings, and nobody here reads them.
    return subprocess.run(
        [path, *arguments], env=environ, capture_output=True, encoding="utf-8", errors="replace", check=False
    )


def slurm_error(result: "subprocess.CompletedProcess[str]") -> str:
    """Return the error message of a failed SLURM command in one line."""
    lines = [re.sub(r"^.*?error: (Batch job submission failed: )?", "", line) for line in result.stderr.splitlines()]
    return "; ".join(" ".join(line.split()) for line in lines if line.strip()) or f"exit code {result.returncode}"


def find_job(job_id: str, *, name: str) -> Job:
    """Return a job's state, from slurmctld or, once that has forgotten the job, from the accounting.

    Args:
        job_id: SLURM's id of the job.
        name: The job's name. A controller that lost its state counts from 1 again and gives the id to another job.
    Raises:
        MachineError: SLURM does not answer.
    """
    result = run_slurm("scontrol", "--oneliner", "show", "job", job_id)
    # An array or heterogeneous job has a line for each part; what the site prints around them is left out.
    lines = [line for line in result.stdout.splitlines() if {"JobId", "JobState"} <= _fields(line).keys()]
    if (result.returncode or not lines) and "Invalid job id" not in result.stderr:
        raise MachineError(f"SLURM does not answer: {slurm_error(result)}: try again, or ask your administrator")
    for line in lines:
        if _fields(line).get("JobName") == name:
            return replace(parse_job(line), job_id=job_id)
    if shutil.which("sacct"):
        # The name comes last: only it may contain the separator.
        result = run_slurm("sacct", "-nXPD", "-j", job_id, "-o", "State,ExitCode,NodeList,JobName")
        rows = [row for row in (line.split("|", 3) for line in result.stdout.splitlines()) if row[3:] == [name]]
        if result.returncode == 0 and rows:
            state, exit_status, nodes, _ = rows[-1]  # one row per start of the job
            code, signal = _exit_status(exit_status)
            return Job(
                job_id,
                _state(state) if _state(state) in END_STATES else UNKNOWN_STATE,  # SLURM calls some that died RUNNING
                restarts=len(rows) - 1,
                exit_code=code,
                signal=signal,
                nodes="" if nodes == "None assigned" else nodes,
            )
    return Job(job_id, UNKNOWN_STATE)


def parse_job(line: str) -> Job:
    """Return a job from a line of `scontrol --oneliner show job`."""
    fields = _fields(line)
    state, reason = _state(fields["JobState"]), fields.get("Reason", "None")
    limit, run_time = time_limit_seconds(fields.get("TimeLimit", "")), time_limit_seconds(fields.get("RunTime", ""))
    code, signal = _exit_status(fields.get("ExitCode", "0:0"))
    return Job(
        job_id=fields["JobId"],
        state=state,
        reason="" if reason == "None" else reason.replace("_", " "),
        restarts=_number(fields.get("Restarts", "")),
        exit_code=code,
        signal=signal,
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        seconds_left=max(0, limit - (run_time or 0)) if state == "RUNNING" and limit else None,
    )


def check_partition_limits(slurm: Slurm, *, nodes: int, evaluation_nodes: int) -> None:
    """Refuse a request that the partition can never satisfy: sbatch accepts some, and the job then waits forever.

    Args:
        slurm: The run's section.
        nodes: Nodes of the training job.
        evaluation_nodes: Nodes of the evaluation job.
    Raises:
        InputError: names each limit that is exceeded.
    """
    result = run_slurm("scontrol", "--all", "--oneliner", "show", "partition")
    lines = [_fields(line) for line in result.stdout.splitlines()]
    partitions = {fields["PartitionName"]: fields for fields in lines if "PartitionName" in fields}
    if result.returncode or not partitions:
        return  # sbatch reports this better
    extra = _extra_options(slurm.extra)
    # sbatch's order: the environment overrides the script, and in the script a later line overrides an earlier one.
    sources = {
        "SBATCH_PARTITION": os.environ.get("SBATCH_PARTITION"),
        "slurm.extra": extra.get("--partition"),
        "slurm.partition": slurm.partition,
    }
    default = next((name for name, fields in partitions.items() if fields.get("Default") == "YES"), None)
    source, name = next(((source, name) for source, name in sources.items() if name), ("slurm.partition", default))
    if name is None or any(part not in partitions for part in name.split(",")):
        seen = f"{source} {name!r} is not on this cluster" if name else "this cluster has no default partition"
        raise InputError(f"{seen}: set {source} to {' or '.join(sorted(partitions))}")
    if "," not in name:  # given several partitions, SLURM takes one that fits
        partition = partitions[name]
        problems = list(
            _exceeded_limits(slurm, nodes=nodes, evaluation_nodes=evaluation_nodes, extra=extra, partition=partition)
        )
        if problems:
            raise InputError("; ".join(problems))


def _exceeded_limits(
    slurm: Slurm, *, nodes: int, evaluation_nodes: int, extra: dict[str, str], partition: dict[str, str]
) -> Iterator[str]:
    """Yield each limit of the partition that the request exceeds.

    A request that `slurm.extra` or the environment overrides is left to sbatch.
    """
    name = partition["PartitionName"]
    # A quality of service may lift the partition's limits, but it adds no nodes.
    lifted = bool(slurm.qos or extra.get("--qos") or os.environ.get("SBATCH_QOS"))
    keys = ("TotalNodes",) if lifted else ("TotalNodes", "MaxNodes")
    counts = [int(partition[key]) for key in keys if partition.get(key, "").isdigit()]
    if "--nodes" not in extra and counts:
        most = min(counts)
        if nodes > most:
            yield f"--nodes {nodes} is more than partition {name} gives a job ({most}): use {most} or fewer"
        if evaluation_nodes > most:
            yield (
                f"evaluate.tensor x evaluate.pipeline ranks need {evaluation_nodes} nodes, more than partition {name} "
                f"gives a job ({most}): lower one of them"
            )
    limit, requested = time_limit_seconds(partition.get("MaxTime", "")), time_limit_seconds(slurm.time)
    overridden = "--time" in extra or "SBATCH_TIMELIMIT" in os.environ
    if not lifted and not overridden and limit and requested and requested > limit:
        yield f"slurm.time {slurm.time} is over the limit of partition {name}: use {partition['MaxTime']} or less"
    if slurm.memory and not any(option.startswith("--mem") for option in extra):
        result = run_slurm("sinfo", "--noheader", f"--partition={name}", "--format=%m")
        memory = [int(text) for text in re.findall(r"^\d+", result.stdout, re.MULTILINE)]
        if memory and _megabytes(slurm.memory) > max(memory):
            yield (
                f"slurm.memory {slurm.memory} is more than a node of partition {name} has ({max(memory)}M): "
                f"use {max(memory)}M or less"
            )


def _extra_options(extra: Sequence[str]) -> dict[str, str]:
    """Return the sbatch options of `slurm.extra` by their long names; a repeated option has its last value."""
    words = [word for line in extra for word in _words(line)]
    options = {}
    for word, next_word in pairwise([*words, ""]):
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            options[name] = value if sign else next_word
        elif word.startswith("-"):
            options[SHORT_OPTIONS.get(word[:2], word[:2])] = word[2:] or next_word
    return options


def _words(line: str) -> list[str]:
    """Return the words of an #SBATCH line, which has a shell's quotes and comments; none if sbatch must judge it."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote is not closed
        return []


def _fields(line: str) -> dict[str, str]:
    """Return the Key=value pairs of one line of scontrol; of a repeated key the first.

    What users write themselves, comments and paths with spaces, comes after what is read here.
    """
    pairs = re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", line)
    return dict(reversed(pairs))


def _state(text: str) -> str:
    """Return the state alone: CANCELLED of "CANCELLED by 1000" or "CANCELLED+", COMPLETED of COMPLETED,COMPLETING."""
    match = re.match(r"[A-Z_]+", text)
    return match[0] if match else UNKNOWN_STATE


def _exit_status(text: str) -> tuple[int, int]:
    """Return exit code and signal of SLURM's 0:12; 0 for what is not given."""
    code, _, signal = text.partition(":")
    return _number(code), _number(signal)


def _number(text: str) -> int:
    """Return the number that a text begins with; 0 if there is none."""
    match = re.match(r"[0-9]{1,18}", text)
    return int(match[0]) if match else 0


def _megabytes(text: str) -> int:
    return _number(text) * {"M": 1, "G": 1024, "T": 1024 * 1024}[text[-1]]
