"""`trainshort runs`: list the runs below a folder, and remove some."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from launch.commands.options import AsJson, path_of
from launch.complete import complete_run_folders

runs_commands = typer.Typer(
    subcommand_metavar="[FOLDER] | rm RUN_DIR...",
    help="List the runs below a folder, by default runs/ (--json for a program); `runs rm` removes some.",
)


@runs_commands.command("list")
def runs_list_command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", parser=path_of, help="Folder of your runs, searched three levels deep.  [default: runs]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder; what `trainshort runs` does. A folder called rm is given as ./rm."""
    from launch.runs import find_runs, summarize_run
    from launch.show.console import show_json
    from launch.show.runs import show_runs

    folder = folder or Path("runs")
    summaries = [summarize_run(path) for path in find_runs(folder)]
    if as_json:
        show_json([summary.to_json() for summary in summaries])
    else:
        show_runs(summaries, folder=folder)


@runs_commands.command("rm")
def runs_remove_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR", parser=path_of, autocompletion=complete_run_folders, help="Run folders."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; refuse what may be in use.")] = False,
) -> None:
    """Ask, then remove run folders with everything in them; their MLflow runs stay."""
    from configs.figures import counted
    from launch.remove import plan_removals, remove_run
    from launch.show.console import show_lines
    from launch.show.runs import removal_lines, removed_lines
    from launch.show.streams import write_error

    removals = plan_removals(folders)
    unsure = next((removal for removal in removals if removal.unseen), None)
    if yes and unsure:
        raise InputError(
            f"{unsure.summary.path} may be in use, {unsure.unseen}: make sure that it is not, then leave out --yes and "
            "answer the question"
        )
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("standard input is not a terminal to ask on: add --yes to remove without asking")
        write_error("".join(f"{line}\n" for removal in removals for line in removal_lines(removal)))
        # not typer.confirm: it writes a part of its question to standard output
        write_error(f"Remove {counted(len(removals), 'run')}? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            show_lines("nothing was removed")
            return
    for removal in removals:
        remove_run(removal)
        show_lines(*removed_lines(removal))
