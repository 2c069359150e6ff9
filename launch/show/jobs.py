"""What `trainshort slurm --submit` and `trainshort jobs` show."""

from datetime import timedelta
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from configs.paths import logs_folder
from launch.show.run import show_lines
from launch.slurm.status import ChainStatus, state_of


def show_submitted(jobs: dict[str, str], *, run_dir: Path) -> None:
    """Write the numbers of submitted jobs."""
    show_lines(
        *(f"submitted {name}: job {number}" for name, number in jobs.items()),
        f"logs: {logs_folder(run_dir)}; where they are: trainshort jobs status {run_dir}",
    )


def show_jobs(status: ChainStatus) -> None:
    """Write the table of a submitted chain."""
    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)  # fits 80 columns
    for name in ("", "job", "state", "restarts", "step", "loss", "time left", "nodes"):
        table.add_column(name, justify="left" if name in ("", "state", "nodes") else "right")
    progress = status.progress
    step = f"{progress.step or 0:,}/{progress.steps:,}"
    loss = "-" if progress.loss is None else f"{progress.loss:.4f}"
    for name, job in status.jobs.items():
        where = f"({job.reason})" if job.state == "PENDING" and job.reason else job.nodes  # as squeue has it
        left = "-" if job.seconds_left is None else str(timedelta(seconds=job.seconds_left))
        figures = (step, loss) if name == "train" else ("", "")
        table.add_row(name, job.number, state_of(job), str(job.restarts), *figures, left, where)
    Console().print(table)
    if status.advice:
        show_lines(status.advice)
