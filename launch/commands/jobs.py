"""Commands on SLURM jobs: `trainshort slurm`, and `trainshort jobs` for the jobs that it submitted."""

from pathlib import Path
from typing import Annotated

import typer

from configs.commands import run_file_named
from launch.commands.options import AsJson, Overrides, RunDir, RunFile, count_option

slurm_commands = typer.Typer()
jobs_commands = typer.Typer(
    no_args_is_help=True, help="The jobs of a run that was submitted with `trainshort slurm --submit`."
)


@slurm_commands.command("slurm")
def slurm_command(
    run: RunFile,
    overrides: Overrides,
    nodes: Annotated[
        int | None, count_option("--nodes", "Nodes to train on.  [default: the fewest that the layout fits]")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the scripts instead of printing them.")] = False,
) -> None:
    """Write sbatch scripts that train, then evaluate, then export."""
    from configs.load import load_run
    from configs.paths import check_run_folder, logs_folder
    from launch.show.console import show_lines, show_text
    from launch.slurm.script import fewest_nodes, find_program, render_scripts

    config = load_run(run, overrides=overrides)
    run_dir = check_run_folder(config)
    nodes = nodes or fewest_nodes(config)
    if submit:
        from launch.show.jobs import show_submitted
        from launch.slurm.submit import submit_run

        with run_file_named(run, overrides):
            jobs = submit_run(config, nodes=nodes, folder=Path.cwd())
        show_submitted(jobs, run_dir=run_dir)
        return
    # The scripts start in the current folder, so that relative paths in the run file mean the same there.
    scripts = render_scripts(
        config,
        run_file=run,
        nodes=nodes,
        overrides=overrides,
        folder=Path.cwd(),
        program=find_program(config),
    )
    needs = f"its log needs the folder {logs_folder(run_dir)}; --submit makes it"
    for name, script in scripts.items():
        show_lines(f"# ----- {name}.sbatch ({needs}) -----")
        show_text(f"{script.rstrip()}\n\n")


@jobs_commands.command("status")
def jobs_status_command(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show the state of the jobs, and how far training is."""
    from launch.show.console import show_json
    from launch.show.jobs import show_chain
    from launch.slurm.status import chain_status

    status = chain_status(run_dir)
    if as_json:
        show_json(status.to_json())
    else:
        show_chain(status)


@jobs_commands.command("stop")
def jobs_stop_command(run_dir: RunDir) -> None:
    """Save a checkpoint and stop; training can be resumed later."""
    from launch.show.console import show_lines
    from launch.slurm.status import stop_chain

    show_lines(*stop_chain(run_dir))


@jobs_commands.command("resume")
def jobs_resume_command(run_dir: RunDir) -> None:
    """Submit the remaining jobs again, as they were submitted before."""
    from launch.show.console import show_lines
    from launch.show.jobs import show_submitted
    from launch.slurm.status import resume_chain

    jobs = resume_chain(run_dir)
    if jobs:
        show_submitted(jobs, run_dir=run_dir)
    else:
        show_lines(f"{run_dir} is trained, evaluated and exported: nothing is left to do")
