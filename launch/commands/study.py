"""The command on a list of runs: study."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import InputError
from launch.commands.options import AsJson, Overrides
from launch.complete import complete_studies

if TYPE_CHECKING:
    from configs.study import LoadedStudy
    from launch.study.execution import StudyExecution

logger = logging.getLogger(__name__)

study_commands = typer.Typer()


@study_commands.command("study")
def study_command(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY.yaml", autocompletion=complete_studies, help="A study, or the name of a shipped one."
        ),
    ],
    overrides: Overrides,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Execute this run alone, a name or NAME-seedN; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs, their tokens and the time expected; write nothing.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit each run's jobs; without it, a later call collects the results.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate a list of runs that differ in some keys, resuming where it stopped; one table, one figure."""
    from configs.study import load_study
    from launch.show.study import show_plan
    from launch.study.execution import StudyExecution, sole_study

    if dry_run and as_json:
        raise InputError("--json is for the results, which --dry-run does not make: leave one of them out")
    loaded = load_study(study, overrides=overrides)
    execution = StudyExecution(loaded, only=only or [])
    if dry_run:
        execution.check()
        show_plan(loaded, execution.chosen, unprepared=execution.unprepared())
        return
    with sole_study(loaded):
        execution.read()  # again: another may have gone on until here
        code = _submit(loaded, execution) if slurm else _execute(execution)
        _show_results(loaded, execution, as_json=as_json)
    if code:
        raise SystemExit(code)


def _execute(execution: "StudyExecution") -> int:
    from configs.commands import typed_command

    return execution.run(again=typed_command())


def _submit(loaded: "LoadedStudy", execution: "StudyExecution") -> int:
    from launch.study.processes import commands_until_asked
    from launch.study.submission import check_texts_of_jobs, submit_runs

    check_texts_of_jobs(loaded.study)
    execution.collect()
    with commands_until_asked() as commands:
        code = execution.prepare(commands)
    if code == 0:
        for line in submit_runs(execution.chosen, folder=Path.cwd()):
            logger.info("%s", line)
    return code


def _show_results(loaded: "LoadedStudy", execution: "StudyExecution", *, as_json: bool) -> None:
    """Write the table and the figure of what is finished, and nest the runs in MLflow."""
    from launch.show.console import show_json
    from launch.show.study import show_study
    from training.study.table import build_table, write_table

    table = build_table(loaded, execution.rows)
    if as_json:
        show_json(table.to_json())
    else:
        show_study(table)
    if not table.rows:
        return
    _, markdown = write_table(table)

    from training.study.plot import draw_study

    figure = draw_study(table)
    logger.info("table: %s%s", markdown, "" if figure is None else f"; figure: {figure}")
    if execution.collected:
        from training.tracking.study import nest_study

        nest_study(loaded, files=[path for path in (markdown, figure) if path is not None])
