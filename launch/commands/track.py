"""`trainshort track`: what a run has to tell MLflow."""

import time
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, MachineError
from launch.commands.options import AsJson, number_option, path_of
from launch.complete import complete_run_folders

track_commands = typer.Typer(help="Send to MLflow what runs have recorded for it.")

_LEAST_SECONDS, _MOST_SECONDS = 1.0, 86_400.0


@track_commands.callback()
def _is_a_group() -> None:
    """Keep `sync` a word of its own while it is the only command."""


@track_commands.command("sync")
def track_sync_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", parser=path_of, autocompletion=complete_run_folders, help="Run folders."),
    ],
    every: Annotated[
        float | None,
        number_option("--every", "SECONDS", "Send again and again, until the runs have ended; Ctrl-C ends it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what waits in run folders, each record once, and end the runs there that were killed."""
    from launch.show.console import show_json
    from launch.show.track import show_synced
    from training.tracking.sync import sync_runs

    if every is not None and not _LEAST_SECONDS <= every <= _MOST_SECONDS:
        raise InputError(f"--every must be {_LEAST_SECONDS:g} to {_MOST_SECONDS:,.0f} seconds, got {every:g}: write 60")
    if every is not None and as_json:
        raise InputError("--json prints one document: leave out --every")
    waits_for = list(dict.fromkeys(folders))
    while True:
        runs, problems = sync_runs(waits_for)
        if as_json:
            show_json({"runs": [run.to_json() for run in runs], "problems": [str(each) for each in problems]})
        else:
            show_synced(runs, again=every is not None)
        ended = [run.run_dir for run in runs if not run.is_open]
        waits_for = [folder for folder in waits_for if folder not in ended]
        if every is None or not waits_for:
            break
        time.sleep(every)
    if problems:
        raise MachineError("; ".join(map(str, problems)))
