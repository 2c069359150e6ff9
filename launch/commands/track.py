"""`trainshort track`: what a run has to tell MLflow, and copies of its curves for other trackers."""

import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, MachineError, TrainshortError
from launch.commands.options import AsJson, path_of, seconds_option
from launch.complete import complete_run_folders, complete_trackers
from parallel.start import interrupt_on_sigterm
from training.curves.trackers import TRACKERS, require_tracker

logger = logging.getLogger(__name__)

track_commands = typer.Typer(help="Send to MLflow what runs have recorded for it, and copy their curves elsewhere.")

RunFolders = Annotated[
    list[Path],
    typer.Argument(metavar="RUN_DIR", parser=path_of, autocompletion=complete_run_folders, help="Run folders."),
]


@track_commands.command("sync")
def track_sync_command(
    folders: RunFolders,
    every: Annotated[
        float | None,
        seconds_option(
            "--every",
            "Send again and again, until the runs and their SLURM jobs have ended; Ctrl-C ends it.",
            least=1,
            example=60,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what waits in run folders, each record once, and end the runs there that were killed."""
    from launch.show.console import show_json
    from launch.show.track import show_synced
    from training.tracking.sync import sync_runs

    if every is not None and as_json:
        raise InputError("--json prints one document: leave out --every")
    folders = list(dict.fromkeys(folders))
    if every is not None:
        _raise(_sync_until_ended(folders, every=every))
        return
    runs, problems = sync_runs(folders)
    if as_json:
        show_json({"runs": [run.to_json() for run in runs], "problems": [str(each) for each in problems.values()]})
    else:
        show_synced(runs)
    _raise(problems.values())


def _sync_until_ended(folders: list[Path], *, every: float) -> list[TrainshortError]:
    """Send again and again until the runs and their jobs have ended; return why some were refused."""
    from launch.show.track import show_synced
    from launch.slurm.record import has_active_jobs
    from training.tracking.sync import has_begun, sync_runs

    fails, refused = False, list[TrainshortError]()
    while True:
        # asked before: a job that ends meanwhile has left records that the next round sends
        active = {folder for folder in folders if has_active_jobs(folder)}
        runs, problems = sync_runs([folder for folder in folders if folder not in active or has_begun(folder)])
        wrong = {folder: each for folder, each in problems.items() if isinstance(each, InputError)}
        refused += wrong.values()
        ended = {run.run_dir for run in runs if not run.is_open} - active
        show_synced([run for run in runs if run.sent or run.run_dir in ended], again=True)
        folders = [folder for folder in folders if folder not in ended and folder not in wrong]
        if not folders:
            return refused
        for folder, problem in problems.items():
            if folder in wrong:
                logger.warning("%s; the other runs go on", problem)
            elif not fails:  # once for each outage
                logger.warning("%s; it is tried again every %g s", problem, every)
        fails = len(problems) > len(wrong)
        time.sleep(every)


def _raise(problems: Collection[TrainshortError]) -> None:
    """Raise the errors as one: a user's, if there is one."""
    if problems:
        kind = InputError if any(isinstance(each, InputError) for each in problems) else MachineError
        raise kind("; ".join(map(str, problems)))


@track_commands.command("copy")
def track_copy_command(
    folders: RunFolders,
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(TRACKERS),
            autocompletion=complete_trackers,
            help="TensorBoard's files in RUN_DIR/tensorboard, or a run of Weights & Biases.",
        ),
    ],
    project: Annotated[str, typer.Option(metavar="NAME", help="wandb: the project of the runs there.")] = "trainshort",
    every: Annotated[
        float | None,
        seconds_option(
            "--every",
            "Copy again and again, until the runs and their SLURM jobs have ended; Ctrl-C ends it.",
            least=1,
            example=30,
        ),
    ] = None,
) -> None:
    """Copy the curves of runs to another tracker, each step once: losses, speed, validations, evaluations."""
    from launch.copies import copy_curves
    from launch.show.track import show_copied

    interrupt_on_sigterm()  # a tracker's run must be closed
    tracker = require_tracker(to)
    problems = copy_curves(
        list(dict.fromkeys(folders)),
        tracker=tracker,
        project=project,
        every=every,
        on_copied=lambda folder, count: show_copied(folder, count, to=to),
    )
    _raise(problems)
