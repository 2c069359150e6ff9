"""The command line: all commands, and how errors are reported.

The commands are in `launch/commands/`. Each one imports what it needs when it runs, because a user waits for every
start.
"""

from typing import Any, cast

import typer

from configs.errors import InputError, TrainshortError
from launch.commands.checkpoint import checkpoint_commands
from launch.commands.jobs import jobs_commands, slurm_commands
from launch.commands.machine import machine_commands
from launch.commands.model import model_commands
from launch.commands.run import run_commands
from launch.failure import report_failure
from launch.local import STOPPED_BY_HAND
from launch.show.streams import ready_streams, write_output
from training.versions import check_frozen

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train decoder language models short, test them long.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help text. Commands of an app without a name become commands of `trainshort` itself.
for commands in (run_commands, model_commands, slurm_commands, machine_commands):
    app.add_typer(commands)
app.add_typer(checkpoint_commands, name="checkpoint")
app.add_typer(jobs_commands, name="jobs")

# The error of a wrong command line. It has no stable import path: some versions of typer bring their own click.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def run_command_line() -> None:
    """Run one command and exit; an error that the user can fix prints one line and sets the exit code."""
    ready_streams()
    try:
        check_frozen()
        code = app(standalone_mode=False, prog_name="trainshort")
        write_output("")  # flush the help text
    except TrainshortError as error:
        code = report_failure(str(error), code=error.exit_code)
    except typer.Abort:  # Ctrl-C
        code = STOPPED_BY_HAND
    except UsageError as error:
        code = report_failure(_usage_message(error), code=InputError.exit_code)
    raise SystemExit(code)


def _usage_message(error: Any) -> str:
    """Return one line that says what is wrong with the command line and what to do."""
    message = str(error.format_message()).rstrip(".?")
    command = error.ctx.command_path if error.ctx else "trainshort"
    return f"{message[0].lower()}{message[1:]}: see `{command} --help`" if message else ""
