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
    from launch.show.jobs import show_jobs
    from launch.show.run import show_json
    from launch.slurm.status import chain_status

    found = chain_status(run_dir)
    if as_json:
        show_json(found.to_json())
    else:
        show_jobs(found)


@app.command()
def stop(run_dir: RunDir) -> None:
    """Save and end: training can go on later."""
    from launch.show.run import show_lines
    from launch.slurm.status import stop_chain

    show_lines(*stop_chain(run_dir))


@app.command()
def resume(run_dir: RunDir) -> None:
    """Submit again what is left, as it was submitted."""
    from launch.show.jobs import show_submitted
    from launch.show.run import show_lines
    from launch.slurm.status import resume_chain

    jobs = resume_chain(run_dir)
    if jobs:
        show_submitted(jobs, run_dir=run_dir)
    else:
        show_lines(f"{run_dir} is trained, evaluated and exported: nothing is left to do")
