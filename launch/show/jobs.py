"""Output of `trainshort slurm --submit` and `trainshort jobs`."""

from datetime import timedelta
from pathlib import Path

from configs.commands import typed_path
from configs.paths import logs_folder
from configs.terminal import printable
from launch.show.console import narrow_table, show_lines, show_table
from launch.slurm.status import ChainStatus, displayed_state


def show_submitted(jobs: dict[str, str], *, run_dir: Path) -> None:
    """Write the ids of submitted jobs."""
    show_lines(
        *(f"submitted {name}: job {job_id}" for name, job_id in jobs.items()),
        f"logs: {logs_folder(run_dir)}; where they are: trainshort jobs status {typed_path(run_dir)}",
    )


def show_chain(status: ChainStatus) -> None:
    """Write the table of a submitted chain, and the advice if there is any."""
    table = narrow_table(
        ("", "job", "state", "restarts", "step", "loss", "time left", "nodes"), left=("", "state", "nodes")
    )
    progress = status.progress
    step = f"{progress.step or 0:,}/{progress.steps:,}"
    loss = "-" if progress.loss is None else f"{progress.loss:.4f}"
    for name, job in status.jobs.items():
        # In the nodes column a waiting job shows its reason, as in squeue.
        nodes = f"({job.reason})" if job.state == "PENDING" and job.reason else job.nodes
        left = "-" if job.seconds_left is None else str(timedelta(seconds=job.seconds_left))
        figures = (step, loss) if name == "train" else ("", "")
        table.add_row(name, job.job_id, displayed_state(job), str(job.restarts), *figures, left, printable(nodes))
    show_table(table)
    if status.advice:
        show_lines(status.advice)
