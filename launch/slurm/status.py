"""Show the state of a run's submitted jobs, stop them, and resume them."""

import json
import re
import signal
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from configs.commands import typed_path
from configs.errors import MachineError
from configs.figures import counted
from configs.load import load_run
from configs.paths import (
    checkpoints_folder,
    export_folder,
    frozen_config,
    logs_folder,
    slurm_stop_file,
)
from configs.schema import RunConfig
from launch.slurm.query import UNKNOWN_STATE, Job, run_slurm, slurm_error
from launch.slurm.record import find_jobs, read_chain, refuse_active_jobs
from launch.slurm.script import CHAIN_JOBS, STOPPED_EXIT_CODE, evaluation_size
from launch.slurm.submit import job_secrets, script_file, sole_submission, submit_jobs
from training.checkpoint.manifest import list_checkpoints, step_folder
from training.evaluation.kept import held_out_files, is_held_out
from training.evaluation.results import protocol_name
from training.export.formats.table import CHAIN_FORMAT
from training.folder import report_write_errors
from training.metrics_reader import newest_step

STOP_SIGNAL = signal.SIGUSR2  # makes the script of a training job save and stop
# Reasons to wait that never pass, and those that pass by themselves, mostly when other jobs end.
PERMANENT_REASONS = re.compile(r"Partition(Node|Time)Limit|(QOS|Assoc)Max\w*Per(Job|Node)\w*")
PASSING_REASONS = re.compile(r"|Priority|Resources|Dependency|BeginTime|(QOS|Assoc)(Grp|Max)\w*")


@dataclass(frozen=True)
class TrainingProgress:
    """How far training is.

    Attributes:
        step: Step of the last whole line of metrics.jsonl; None if there is no such line.
        loss: Loss of that line, likewise.
        steps: Steps of the whole run.
        checkpoint: Name of the newest checkpoint; None if there is none.
    """

    step: int | None
    loss: float | None
    steps: int
    checkpoint: str | None


@dataclass(frozen=True)
class ChainStatus:
    """State of a submitted chain.

    Attributes:
        run_dir: The run folder.
        jobs: The jobs by name, in the order of the chain.
        nodes: Nodes of the training job.
        progress: How far training is.
        advice: What the user should do; None if there is nothing to do.
    """

    run_dir: Path
    jobs: dict[str, Job]
    nodes: int
    progress: TrainingProgress
    advice: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the document of `jobs status --json`."""
        loss = self.progress.loss
        return {
            "run_dir": str(self.run_dir),
            **asdict(self.progress),
            "loss": loss if loss is not None and isfinite(loss) else None,  # JSON has no nan
            "jobs": [_job_to_json(name, job) for name, job in self.jobs.items()],
            "advice": self.advice,
        }


def _job_to_json(name: str, job: Job) -> dict[str, Any]:
    values = asdict(job)
    return {"name": name, "job": values.pop("job_id"), **values, "state": displayed_state(job)}


def chain_status(run_dir: Path) -> ChainStatus:
    """Return the state of a run's jobs.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM is not on this machine or does not answer.
    """
    chain = read_chain(run_dir)
    jobs = find_jobs(chain)
    progress = read_progress(run_dir)
    return ChainStatus(run_dir, jobs, chain.nodes, progress, _advice(run_dir, jobs, nodes=chain.nodes))


def displayed_state(job: Job) -> str:
    """Return the state to show: STOPPED for a job that was asked to stop, which SLURM calls FAILED."""
    # The signal itself ends a script that has not set its trap yet.
    stopped = job.exit_code == STOPPED_EXIT_CODE or job.signal == STOP_SIGNAL
    return "STOPPED" if job.state == "FAILED" and stopped else job.state


def stop_chain(run_dir: Path) -> list[str]:
    """Ask a running training job to save and stop, cancel the other jobs, and return a line for each.

    Raises:
        InputError: nothing was submitted from this folder.
        MachineError: SLURM refuses.
    """
    lines, jobs = [], find_jobs(read_chain(run_dir))
    for name, job in reversed(jobs.items()):  # the last job first, so that none starts meanwhile
        if job.ended:
            continue
        saves = name == "train" and job.state == "RUNNING"
        options = ["--batch", f"--signal={STOP_SIGNAL.name.removeprefix('SIG')}"] if saves else []
        result = run_slurm("scancel", *options, job.job_id)
        if result.returncode:
            raise MachineError(f"job {job.job_id} ({name}) cannot be stopped: {slurm_error(result)}: ask its owner")
        if saves:
            # If a node is lost before the job has stopped, SLURM starts the job again: that start reads this file.
            with report_write_errors(run_dir):
                slurm_stop_file(run_dir).write_text(f"{job.job_id}\n", encoding="utf-8")
        lines.append(f"{name}: job {job.job_id} " + ("is asked to save and end" if saves else "is cancelled"))
    return lines or [f"{run_dir} has no job that runs or waits"]


def resume_chain(run_dir: Path) -> dict[str, str]:
    """Submit the remaining jobs of a chain again, as they were frozen, and return their ids by name.

    Raises:
        InputError: nothing was submitted from this folder, its jobs have not ended, or a secret is not set here.
        MachineError: sbatch refuses a script, or the run folder cannot be written.
    """
    read_chain(run_dir)  # refuses a folder without jobs before the next line creates folders in it
    with sole_submission(run_dir):
        refuse_active_jobs(run_dir)
        chain = read_chain(run_dir)
        remaining = tuple(name for name in remaining_jobs(run_dir) if script_file(run_dir, name=name).is_file())
        kept = {name: job_id for name, job_id in chain.jobs.items() if name not in remaining}
        secrets = job_secrets(load_run(str(frozen_config(run_dir)))) if remaining else {}
        return submit_jobs(run_dir, chain=replace(chain, jobs=kept), names=remaining, secrets=secrets)


def remaining_jobs(run_dir: Path) -> tuple[str, ...]:
    """Return the names of the jobs that still have work to do, in the order of the chain."""
    config = load_run(str(frozen_config(run_dir)))
    last = step_folder(checkpoints_folder(run_dir), step=config.train.steps)
    if not last.is_dir():
        return CHAIN_JOBS
    reports = [report for report in held_out_files(last) if _is_newer(report, last)]
    if not any(_is_complete(report, config=config, checkpoint=last) for report in reports):
        return CHAIN_JOBS[1:]
    return () if _is_newer(export_folder(run_dir, form=CHAIN_FORMAT), last) else CHAIN_JOBS[2:]


def _is_newer(result: Path, checkpoint: Path) -> bool:
    return result.exists() and result.stat().st_mtime >= checkpoint.stat().st_mtime


def _is_complete(report: Path, *, config: RunConfig, checkpoint: Path) -> bool:
    """Return whether a report is of this checkpoint and the held-out text, with all lengths and protocols of the run.

    The report may come from an evaluation that the user ran by hand with other lengths, or on another text.
    """
    wanted = {(length, protocol) for length in config.evaluation_lengths for protocol in config.evaluate.protocols}
    try:
        document = json.loads(report.read_text(encoding="utf-8"))
        measured = {(result["length"], protocol_name(result)) for result in document["results"]}
        is_of_run = Path(document["checkpoint"]).name == checkpoint.name and is_held_out(document)
        return is_of_run and wanted <= measured
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a broken report: evaluate again


def read_progress(run_dir: Path) -> TrainingProgress:
    """Return how far a submitted run's training is.

    Raises:
        InputError: metrics.jsonl cannot be read.
    """
    steps = load_run(str(frozen_config(run_dir))).train.steps
    newest = next((checkpoint.path.name for checkpoint in reversed(list_checkpoints(run_dir))), None)
    last = newest_step(run_dir)
    return TrainingProgress(last.get("step"), last.get("loss"), steps, newest)


def _advice(run_dir: Path, jobs: dict[str, Job], *, nodes: int) -> str | None:
    """Return what to do about the first job that needs something."""
    remaining = remaining_jobs(run_dir)
    evaluation = evaluation_size(load_run(str(frozen_config(run_dir))))
    nodes_of = {"train": nodes, "evaluate": evaluation.nodes}
    is_training = any(name == "train" and not job.ended for name, job in jobs.items())
    for name, job in jobs.items():
        log = logs_folder(run_dir) / f"slurm-{name}-{job.job_id}.log"
        if job.ended:
            # However it ended, a job without remaining work needs nothing.
            state = displayed_state(job) if name in remaining else "COMPLETED"
            advice = _advice_after_end(name, state, run_dir=run_dir, log=log, is_training=is_training)
        else:
            advice = _advice_while_active(name, job, run_dir=run_dir, log=log, nodes=nodes_of.get(name, 1))
        if advice:
            return advice
    return None


def _advice_while_active(name: str, job: Job, *, run_dir: Path, log: Path, nodes: int) -> str | None:
    folder = typed_path(run_dir)
    if "held" in job.reason.lower():
        return f"{name} is held ({job.reason}): see why in sinfo -R and {log}, then scontrol release {job.job_id}"
    if job.state != "PENDING":
        return None
    if PERMANENT_REASONS.fullmatch(job.reason):
        return (
            f"{name} will never start as it is ({job.reason}): trainshort jobs stop {folder}, change the slurm "
            "section, and submit again"
        )
    if not PASSING_REASONS.fullmatch(job.reason):
        needed = counted(nodes, "node")
        return f"{name} waits for {needed} with what its script asks for ({job.reason}): see sinfo"
    return None


def _advice_after_end(name: str, state: str, *, run_dir: Path, log: Path, is_training: bool) -> str | None:
    folder = typed_path(run_dir)
    if state == UNKNOWN_STATE:
        return f"SLURM has forgotten {name}: read {log}, then trainshort jobs resume {folder}"
    if state == "STOPPED":
        return f"stopped: trainshort jobs resume {folder} continues it"
    if state == "CANCELLED" and is_training:
        return f"{name} is cancelled: once train has ended, trainshort jobs resume {folder} submits what is left"
    if state != "COMPLETED":
        return f"{name} ended {state}: read {log}, then trainshort jobs resume {folder}"
    return None
