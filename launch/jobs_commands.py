"""`trainshort jobs`: the command line of submitted runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The jobs of a run that was submitted with `trainshort slurm --submit`.")

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")]


@app.command()
def status(
    run_dir: RunDir, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False
) -> None:
    """Show where the jobs are, and how far training is."""
    from launch.jobs import status as status_of
    from launch.show import show_json
    from launch.show_jobs import show_jobs

    found = status_of(run_dir)
    if as_json:
        show_json(found.document())
    else:
        show_jobs(found)


@app.command()
def stop(run_dir: RunDir) -> None:
    """Save and end: training can go on later."""
    from launch.jobs import stop as stop_jobs
    from launch.show import show_lines

    show_lines(*stop_jobs(run_dir))


@app.command()
def resume(run_dir: RunDir) -> None:
    """Submit again what is left, as it was submitted."""
    from launch.jobs import resume as resume_jobs
    from launch.show import show_lines
    from launch.show_jobs import show_submitted

    jobs = resume_jobs(run_dir)
    if jobs:
        show_submitted(jobs, run_dir=run_dir)
    else:
        show_lines(f"{run_dir} is trained, evaluated and exported: nothing is left to do")
