"""`trainshort reproduce`: what differs from a run here and now, and the commands that repeat it."""

import os
from typing import Annotated

import typer

from configs.errors import MachineError
from launch.commands.options import AsJson, RunDir

reproduce_commands = typer.Typer()


@reproduce_commands.command("reproduce")
def reproduce_command(
    run_dir: RunDir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of the prepared data and of initial weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what differs here and now from a run, whether it matters, and how to repeat the run in a new folder."""
    from launch.machine import core_count, gpu_count, gpu_name
    from launch.show.console import show_json
    from launch.show.reproduction import show_reproduction
    from training.reproduction.here import Here
    from training.reproduction.reproduce import compare_with_here

    gpus = gpu_count(os.environ)
    here = Here(
        gpu=(gpu_name(os.environ) or "a GPU") if gpus else None, gpus=gpus, cores=core_count(), variables=os.environ
    )
    reproduction = compare_with_here(run_dir, here=here, reads_all=verify)
    if as_json:
        show_json(reproduction.to_json())
    else:
        show_reproduction(reproduction)
    if reproduction.grade == "other":  # after the output, which says why
        raise SystemExit(MachineError.exit_code)
