"""`trainshort watch`: follow a run by its files."""

import os
import sys
from typing import Annotated

import typer

from launch.commands.options import AsJson, RunDir, seconds_option

watch_commands = typer.Typer()


@watch_commands.command("watch")
def watch_command(
    run_dir: RunDir,
    every: Annotated[
        float, seconds_option("--every", "Time from one picture to the next.", least=0.1, example=2)
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture and end, as when the output is a file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Follow a run by its files, also one on another machine: losses, speed, time left, checkpoints, warnings."""
    from launch.show.console import output_width, show_json, show_lines
    from launch.show.refresh import refresh
    from launch.show.watch import watch_lines
    from launch.watch import RunWatcher

    watcher = RunWatcher(run_dir)
    if as_json:
        show_json(watcher.look().to_json())
    elif once or not sys.stdout.isatty():
        show_lines(*(line.plain.rstrip() for line in watch_lines(watcher.look(), columns=output_width())))
    else:
        refresh(lambda columns: watch_lines(watcher.look(), columns=columns), seconds=every, environ=os.environ)
