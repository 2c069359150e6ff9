"""The submitted jobs of a run: where they are, stop them, start them again."""

import json
import re
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import MachineError
from configs.load import load_run
from configs.paths import (
    checkpoints_folder,
    evaluation_folder,
    export_folder,
    frozen_config,
    logs_folder,
    slurm_stop_file,
)
from configs.schema import RunConfig
from launch.slurm.query import UNKNOWN, Job, ask, said
from launch.slurm.script import CHAIN, STOPPED
from launch.slurm.submit import jobs_of, read_chain, refuse_active, sole_submission, submit
from training.checkpoint.manifest import list_checkpoints, step_folder
from training.folder import writing

SAVE_AND_END = signal.SIGUSR2  # to the batch script of a training job
# Reasons to wait that no waiting ends, and those that pass by themselves, often when other jobs end.
NEVER = re.compile(r"Partition(Node|Time)Limit|(QOS|Assoc)Max\w*Per(Job|Node)\w*")
PASSES = re.compile(r"|Priority|Resources|Dependency|BeginTime|(QOS|Assoc)(Grp|Max)\w*")


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
class ChainStatus:
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

    def to_json(self) -> dict[str, Any]:
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


def chain_status(run_dir: Path) -> ChainStatus:
    """Return where the jobs of a run are.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM is not on this machine or does not answer.
    """
    chain = read_chain(run_dir)
    jobs = jobs_of(chain)
    progress = progress_of(run_dir)
    return ChainStatus(run_dir, jobs, chain.nodes, progress, _advice(run_dir, jobs, nodes=chain.nodes))


def state_of(job: Job) -> str:
    """Return a job's state as people call it: one that was asked to stop is no failure."""
    # The signal itself ends a script that is too young to have a trap for it.
    stopped = job.exit_code == STOPPED or job.signal == SAVE_AND_END
    return "STOPPED" if job.state == "FAILED" and stopped else job.state


def stop_chain(run_dir: Path) -> list[str]:
    """Ask a training job to save and end, cancel what waits, and return a line for each.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM does not take it.
    """
    lines, jobs = [], jobs_of(read_chain(run_dir))
    for name, job in reversed(jobs.items()):  # what waits first: nothing of it may start meanwhile
        if job.ended:
            continue
        saves = name == "train" and job.state == "RUNNING"
        options = ["--batch", f"--signal={SAVE_AND_END.name.removeprefix('SIG')}"] if saves else []
        done = ask("scancel", *options, job.number)
        if done.returncode:
            raise MachineError(f"job {job.number} ({name}) cannot be stopped: {said(done)}: ask its owner")
        if saves:
            with writing(run_dir):  # for the next start, where SLURM makes one of a lost node
                slurm_stop_file(run_dir).write_text(f"{job.number}\n", encoding="utf-8")
        lines.append(f"{name}: job {job.number} " + ("is asked to save and end" if saves else "is cancelled"))
    return lines or [f"{run_dir} has no job that runs or waits"]


def resume_chain(run_dir: Path) -> dict[str, str]:
    """Submit again what is left of a chain, as it was submitted; return the new numbers by name.

    Raises:
        InputError: nothing was submitted from this folder, or its jobs have not ended.
        MachineError: sbatch refuses a script, or the run folder cannot be written.
    """
    read_chain(run_dir)  # before a folder is made where there is no run
    with sole_submission(run_dir):
        refuse_active(run_dir)
        chain, left = read_chain(run_dir), remaining(run_dir)
        kept = {name: number for name, number in chain.jobs.items() if name not in left}
        return submit(run_dir, chain=replace(chain, jobs=kept), names=left)


def remaining(run_dir: Path) -> tuple[str, ...]:
    """Return the jobs that have something left to do, in the order of the chain."""
    config = load_run(str(frozen_config(run_dir)))
    last = step_folder(checkpoints_folder(run_dir), step=config.train.steps)
    if not last.is_dir():
        return CHAIN
    report, exported = evaluation_folder(run_dir) / "report.json", export_folder(run_dir, form="hf")
    if not (_newer(report, last) and _measures(report, config=config, checkpoint=last)):
        return CHAIN[1:]
    return () if _newer(exported, last) else CHAIN[2:]


def _newer(result: Path, checkpoint: Path) -> bool:
    return result.exists() and result.stat().st_mtime >= checkpoint.stat().st_mtime


def _measures(report: Path, *, config: RunConfig, checkpoint: Path) -> bool:
    """Return whether a report is of a checkpoint and has all that the run measures; one may have made it by hand."""
    wanted = {(length, protocol) for length in config.evaluation_lengths for protocol in config.evaluate.protocols}
    try:
        document = json.loads(report.read_text(encoding="utf-8"))
        found = {
            (result["length"], f"sliding:{result['stride']}" if result["protocol"] == "sliding" else result["protocol"])
            for result in document["results"]
        }
        return Path(document["checkpoint"]).name == checkpoint.name and wanted <= found
    except (OSError, ValueError, KeyError, TypeError):
        return False  # made again


def progress_of(run_dir: Path) -> Progress:
    """Return how far a submitted run's training is."""
    steps = load_run(str(frozen_config(run_dir))).train.steps
    newest = next((found.path.name for found in reversed(list_checkpoints(run_dir))), None)
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]  # the last one may be being written
    last = json.loads(whole[-1]) if whole else {}
    return Progress(last.get("step"), last.get("loss"), steps, newest)


def _advice(run_dir: Path, jobs: dict[str, Job], *, nodes: int) -> str | None:
    left, training = remaining(run_dir), any(name == "train" and not job.ended for name, job in jobs.items())
    for name, job in jobs.items():
        log = logs_folder(run_dir) / f"slurm-{name}-{job.number}.log"
        if job.ended:
            # What has ended and has nothing left to do needs nothing.
            state = state_of(job) if name in left else "COMPLETED"
            found = _advice_after(name, state, run_dir=run_dir, log=log, training=training)
        else:
            found = _advice_on_wait(name, job, run_dir=run_dir, log=log, nodes=nodes if name == "train" else 1)
        if found:
            return found
    return None


def _advice_on_wait(name: str, job: Job, *, run_dir: Path, log: Path, nodes: int) -> str | None:
    if "held" in job.reason.lower():
        return f"{name} is held ({job.reason}): see why in sinfo -R and {log}, then scontrol release {job.number}"
    if job.state != "PENDING":
        return None
    if NEVER.fullmatch(job.reason):
        return (
            f"{name} will never start as it is ({job.reason}): trainshort jobs stop {run_dir}, change the slurm "
            "section, and submit again"
        )
    if not PASSES.fullmatch(job.reason):
        return f"{name} waits for {nodes} nodes with what its script asks for ({job.reason}): see sinfo"
    return None


def _advice_after(name: str, state: str, *, run_dir: Path, log: Path, training: bool) -> str | None:
    if state == UNKNOWN:
        return f"SLURM has forgotten {name}: read {log}, then trainshort jobs resume {run_dir}"
    if state == "STOPPED":
        return f"stopped: trainshort jobs resume {run_dir} goes on"
    if state == "CANCELLED" and training:
        return f"{name} is cancelled: once train has ended, trainshort jobs resume {run_dir} submits what is left"
    if state != "COMPLETED":
        return f"{name} ended {state}: read {log}, then trainshort jobs resume {run_dir}"
    return None
