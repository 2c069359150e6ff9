"""The submitted jobs of a run: where they are, stop them, start them again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import MachineError
from configs.load import load_run
from configs.paths import checkpoints_folder, evaluation_folder, export_folder, frozen_config, logs_folder
from launch.chain import Chain, read_chain, refuse_active, submit
from launch.cluster import UNKNOWN, Job, ask, find_job, said
from launch.slurm import CHAIN, STOPPED

SAVE_AND_END = "USR2"  # to the batch script of a training job
TURN = ("", "None", "Priority", "Resources", "Dependency", "BeginTime")  # reasons to wait that pass by themselves


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        step, loss: Of the last line of metrics.jsonl; None where there is none.
        steps: Of the whole run.
        checkpoint: Name of the newest checkpoint; None where there is none.
    """

    step: int | None
    loss: float | None
    steps: int
    checkpoint: str | None


@dataclass(frozen=True)
class Status:
    """A submitted chain.

    Attributes:
        jobs: By name, in the order of the chain.
        advice: What to do, where something is to be done.
    """

    run_dir: Path
    jobs: dict[str, Job]
    nodes: int
    progress: Progress
    advice: str | None

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "run_dir": str(self.run_dir),
            **asdict(self.progress),
            "jobs": [_record(name, job) for name, job in self.jobs.items()],
            "advice": self.advice,
        }


def _record(name: str, job: Job) -> dict[str, Any]:
    figures = asdict(job)
    return {"name": name, "job": figures.pop("number"), **figures, "state": state_of(job)}


def status(run_dir: Path) -> Status:
    """Return where the jobs of a run are.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM is not on this machine or does not answer.
    """
    chain = read_chain(run_dir)
    jobs = {name: find_job(number) for name, number in chain.jobs.items()}
    progress = progress_of(run_dir)
    return Status(run_dir, jobs, chain.nodes, progress, _advice(run_dir, jobs, chain=chain))


def state_of(job: Job) -> str:
    """Return a job's state as people call it: one that was asked to stop is no failure."""
    return "STOPPED" if job.state == "FAILED" and job.exit_code == STOPPED else job.state


def stop(run_dir: Path) -> list[str]:
    """Ask a training job to save and end, cancel what waits, and return a line for each.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM does not take it.
    """
    lines = []
    jobs = {name: find_job(number) for name, number in read_chain(run_dir).jobs.items()}
    for name, job in reversed(jobs.items()):  # what waits first: nothing of it may start meanwhile
        if job.ended:
            continue
        saves = name == "train" and job.state == "RUNNING"
        done = ask("scancel", *(["--batch", f"--signal={SAVE_AND_END}"] if saves else []), job.number)
        if done.returncode:
            raise MachineError(f"job {job.number} ({name}) cannot be stopped: {said(done)}: ask its owner")
        lines.append(f"{name}: job {job.number} " + ("is asked to save and end" if saves else "is cancelled"))
    return lines or [f"{run_dir} has no job that runs or waits"]


def resume(run_dir: Path) -> Chain | None:
    """Submit again what is left of a chain, as it was submitted; None where nothing is left.

    Raises:
        InputError: nothing was submitted from this folder, or its jobs have not ended.
        MachineError: sbatch refuses a script.
    """
    chain = read_chain(run_dir)
    refuse_active(run_dir)
    left = remaining(run_dir)
    return submit(run_dir, names=left, nodes=chain.nodes) if left else None


def remaining(run_dir: Path) -> tuple[str, ...]:
    """Return the jobs that have something left to do, in the order of the chain."""
    steps = load_run(str(frozen_config(run_dir))).train.steps
    last = checkpoints_folder(run_dir) / f"step_{steps:07d}"
    if not last.is_dir():
        return CHAIN
    # Each result is newer than what it was made from, else it is made again.
    made_at = last.stat().st_mtime
    for index, result in enumerate((evaluation_folder(run_dir) / "report.json", export_folder(run_dir, form="hf"))):
        if not result.exists() or result.stat().st_mtime < made_at:
            return CHAIN[index + 1 :]
    return ()


def progress_of(run_dir: Path) -> Progress:
    """Return how far a submitted run's training is."""
    steps = load_run(str(frozen_config(run_dir))).train.steps
    folder = checkpoints_folder(run_dir)
    names = [path.name for path in folder.glob("step_*")] if folder.is_dir() else []
    newest = max(names, key=lambda name: int(name.removeprefix("step_")), default=None)
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]  # the last one may be being written
    last = json.loads(whole[-1]) if whole else {}
    return Progress(last.get("step"), last.get("loss"), steps, newest)


def _advice(run_dir: Path, jobs: dict[str, Job], *, chain: Chain) -> str | None:
    train = jobs.get("train")
    for name, job in jobs.items():
        state = state_of(job)
        log = logs_folder(run_dir) / f"slurm-{name}-{job.number}.log"
        if not job.ended and "held" in job.reason.lower():
            return f"{name} is held ({job.reason}): see why in sinfo -R and {log}, then scontrol release {job.number}"
        if state == "PENDING" and job.reason not in TURN:
            nodes = chain.nodes if name == "train" else 1
            return f"{name} waits for {nodes} nodes with what its script asks for ({job.reason}): see sinfo"
        if state == UNKNOWN and remaining(run_dir):
            return f"SLURM has forgotten job {job.number}: read {log}, then trainshort jobs resume {run_dir}"
        if state == "STOPPED":
            return f"stopped: trainshort jobs resume {run_dir} goes on"
        if state == "CANCELLED" and train and not train.ended:
            return f"{name} is cancelled: once train has ended, trainshort jobs resume {run_dir} submits what is left"
        if job.ended and state not in ("COMPLETED", UNKNOWN):
            return f"{name} ended {state}: read {log}, then trainshort jobs resume {run_dir}"
    return None
