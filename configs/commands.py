"""Commands of trainshort: as messages tell the user to type them, and as one process starts another.

A message that tells to type `trainshort prepare` or `trainshort train` leaves out the run file: most code does not know
its name. The command line, which does, completes the message.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import TrainshortError
from configs.secrets import hide_secrets

_COMMAND = re.compile(r"`trainshort (?:prepare|train)(?=`| --)")


def path_argument(path: Path | str) -> str:
    """Return a path as an argument of a command, with ./ before it if it would be read as an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def typed_path(path: Path | str) -> str:
    """Return the result of `path_argument` quoted for a shell."""
    return shlex.quote(path_argument(path))


def typed_overrides(overrides: Sequence[str]) -> str:
    """Return the user's `--set` options quoted for a shell, each with a space before it."""
    return "".join(f" --set {shlex.quote(value)}" for value in overrides)


def override_options(overrides: Iterable[str]) -> list[str]:
    """Return the `--set` options of a command that is started with these overrides."""
    return [word for override in overrides for word in ("--set", override)]


def typed_command() -> str:
    """Return this process's command line as the user typed it, quoted for a shell, without secrets."""
    return hide_secrets(shlex.join(["trainshort", *sys.argv[1:]]))


def command_here(*arguments: str) -> list[str]:
    """Return the command line of a trainshort process with this Python and this code.

    -P keeps the working directory off sys.path: the user may have a folder called training or configs there.
    """
    return [sys.executable, "-P", "-m", "trainshort", *arguments]


def name_run_file(text: str, run: str, overrides: Sequence[str] = ()) -> str:
    """Return a message with the run file added to its commands, quoted for a shell.

    Args:
        text: As in "run `trainshort prepare`".
        run: The run file as the user named it.
        overrides: The values of the user's `--set` options.
    """
    return _COMMAND.sub(lambda match: f"{match[0]} {typed_path(run)}{typed_overrides(overrides)}", text)


@contextmanager
def run_file_named(run: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Add the run file to the commands in errors that the block raises; see `name_run_file`."""
    try:
        yield
    except TrainshortError as error:
        error.args = (name_run_file(str(error), run, overrides), *error.args[1:])
        raise
