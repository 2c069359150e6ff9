"""Submit the runs of a study to SLURM: a chain of jobs each, train and then evaluate."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import InputError
from configs.paths import chain_file, run_folder
from configs.study import HELD_OUT_TEXT, Study
from launch.slurm.record import find_jobs, read_chain
from launch.slurm.script import CHAIN_JOBS, fewest_nodes
from launch.slurm.submit import submit_run
from training.study.progress import RunProgress

STUDY_JOBS = CHAIN_JOBS[:2]
"""The jobs of a study's run: it is not exported, and some positions cannot be."""


def check_texts_of_jobs(study: Study) -> None:
    """Refuse a study whose texts the jobs of a run do not evaluate.

    Raises:
        InputError: names them.
    """
    others = [text for text in study.texts if text != HELD_OUT_TEXT]
    if others:
        raise InputError(
            f"texts has {', '.join(others)}, but the jobs of a run evaluate only held-out: leave it out until the runs "
            "are trained, then start `trainshort study` without --slurm on a machine that can evaluate"
        )


def submit_runs(progress: Sequence[RunProgress], *, folder: Path) -> Iterator[str]:
    """Submit each run that is not finished and has no jobs that run or wait; yield a line per run.

    Args:
        progress: The runs.
        folder: Working directory of the jobs.
    Raises:
        InputError: a run cannot start.
        MachineError: SLURM refuses.
    """
    for each in progress:
        config, label = each.planned.config, each.planned.label
        if each.stage not in ("train", "evaluate"):
            continue
        if states := _active_jobs(run_folder(config)):
            yield f"{label}: {states}"
        else:
            jobs = submit_run(config, nodes=fewest_nodes(config), folder=folder, names=STUDY_JOBS)
            yield f"{label}: submitted {', '.join(f'{name} as job {job_id}' for name, job_id in jobs.items())}"


def _active_jobs(run_dir: Path) -> str:
    """Return the states of a run's jobs; empty if none runs or waits."""
    jobs = find_jobs(read_chain(run_dir)) if chain_file(run_dir).is_file() else {}
    if all(job.ended for job in jobs.values()):
        return ""
    return ", ".join(f"{name} is job {job.job_id}, {job.state}" for name, job in jobs.items())
