"""The command line: all commands, and how errors are reported.

The commands are in `launch/commands/`. Each one imports what it needs when it runs, because a user waits for every
start.
"""

import logging
import os
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from configs.errors import InputError, TrainshortError
from launch.commands.checkpoint import checkpoint_commands
from launch.commands.exchange import exchange_commands
from launch.commands.group import CommandGroup, ListingGroup, did_you_mean
from launch.commands.harness import harness_commands
from launch.commands.jobs import jobs_commands, slurm_commands
from launch.commands.machine import machine_commands
from launch.commands.model import model_commands
from launch.commands.profile import profile_commands
from launch.commands.reproduce import reproduce_commands
from launch.commands.retrieval import retrieval_commands
from launch.commands.run import run_commands
from launch.commands.runs import runs_commands
from launch.commands.study import study_commands
from launch.commands.track import track_commands
from launch.commands.watch import watch_commands
from launch.complete import COMPLETE_VARIABLE
from launch.failure import explain_refused_place, report_failure, require_current_folder
from launch.local import STOPPED_BY_HAND
from launch.show.streams import ready_streams, write_output
from training.out_of_memory import explain_out_of_memory
from training.versions import check_frozen, installed_version

PROGRAM = "trainshort"
SHOWN_VERSIONS = ("torch", "deepspeed", "megatron-core", "mlflow")

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich would take [default: 64] for a style, and show nothing
    pretty_exceptions_enable=False,
    help="Train decoder language models short, test them long.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help text. Commands of an app without a name become commands of `trainshort` itself.
for commands in (
    run_commands,
    watch_commands,
    profile_commands,
    model_commands,
    retrieval_commands,
    study_commands,
    harness_commands,
    exchange_commands,
    slurm_commands,
    machine_commands,
    reproduce_commands,
):
    app.add_typer(commands)
app.add_typer(runs_commands, name="runs", cls=ListingGroup)
app.add_typer(checkpoint_commands, name="checkpoint", cls=CommandGroup)
app.add_typer(jobs_commands, name="jobs", cls=CommandGroup)
app.add_typer(track_commands, name="track", cls=CommandGroup)

# The error of a wrong command line. It has no stable import path: some versions of typer bring their own click.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def _show_version(value: bool) -> None:
    if value:
        others = ", ".join(f"{package} {installed_version(package) or 'missing'}" for package in SHOWN_VERSIONS)
        write_output(f"{PROGRAM} {installed_version(PROGRAM) or '(not installed)'} ({others})\n")
        raise typer.Exit


def _choose_level(option: str, level: int) -> Callable[[typer.Context, bool], None]:
    """Return what `--quiet` or `--verbose` does: it sets the root logger's level, which decides what is said."""

    def choose(context: typer.Context, value: bool) -> None:
        if not value or context.resilient_parsing:
            return
        if context.meta.setdefault(f"{PROGRAM}.verbosity", option) != option:
            raise InputError("--quiet and --verbose contradict each other: leave one of them out")
        logging.getLogger().setLevel(level)

    return choose


@app.callback()
def _options_of_every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, expose_value=False, callback=_show_version, help="Show versions and exit."
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            expose_value=False,
            callback=_choose_level("--quiet", logging.WARNING),
            help="Say nothing but results, warnings and errors.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            expose_value=False,
            callback=_choose_level("--verbose", logging.DEBUG),
            help="Say more, for finding out why something happens.",
        ),
    ] = False,
) -> None:
    """Declare the options; their callbacks do the work."""


def build_command() -> Any:
    """Return the whole command line, where every command takes `--quiet` and `--verbose` too."""
    command: Any = typer.main.get_command(app)
    shared = [option for option in command.params if option.name in ("quiet", "verbose")]
    _add_options(command, shared)
    return command


def _add_options(group: Any, options: list[Any]) -> None:
    for command in group.commands.values():
        command.params.extend(options)
        if isinstance(command, CommandGroup):
            _add_options(command, options)


def run_command_line() -> None:
    """Run one command and exit; an error that the user can fix prints one line and sets the exit code."""
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # rich's own NO_COLOR still writes bold text and moves the cursor
    color = False if os.environ.get("TERM") == "dumb" else None
    is_completing = COMPLETE_VARIABLE in os.environ  # the shell shows what is being typed: nothing may appear in it
    ready_streams()
    logging.getLogger().setLevel(logging.INFO)
    try:
        check_frozen()
        require_current_folder()
        with explain_refused_place(), explain_out_of_memory():
            code = _run_parser(color=color)
        write_output("")  # flush the help text
    except TrainshortError as error:
        code = report_failure("" if is_completing else str(error), code=error.exit_code)
    except typer.Abort:  # Ctrl-C
        code = STOPPED_BY_HAND
    except UsageError as error:
        code = report_failure("" if is_completing else _usage_message(error), code=InputError.exit_code)
    raise SystemExit(code)


def _run_parser(*, color: bool | None) -> Any:
    """Run the command that the arguments name; return its exit code, None for 0.

    Raises:
        MachineError: standard output does not take what the parser's library writes itself: help and completion.
    """
    try:
        return build_command().main(standalone_mode=False, prog_name=PROGRAM, color=color)
    except OSError:
        write_output("")  # fails again if this is what failed
        raise
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return None  # the library's own answer to a reader of help that has gone; see `write_output`


def _usage_message(error: Any) -> str:
    """Return one line that says what is wrong with the command line and what to do."""
    is_unknown_option = hasattr(error, "possibilities")
    message = str(error.message if is_unknown_option else error.format_message()).rstrip(".?")
    command = error.ctx.command_path if error.ctx else PROGRAM
    if is_unknown_option and error.ctx:
        options = [name for option in error.ctx.command.params for name in option.opts if name.startswith("--")]
        message += did_you_mean(error.option_name, options)
    return f"{message[0].lower()}{message[1:]}: see `{command} --help`" if message else ""
