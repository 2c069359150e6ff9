"""The commands that messages tell the user to type: quoted for a shell, and with the user's own run file.

A message that tells to type `trainshort prepare` or `trainshort train` leaves out the run file: most code does not know
its name. The command line, which does, completes the message.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import TrainshortError

_COMMAND = re.compile(r"`trainshort (?:prepare|train)(?=`| --)")


def typed_path(path: Path | str) -> str:
    """Return a path as to type it: quoted for a shell, and with ./ if it would be read as an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def typed_overrides(overrides: Sequence[str]) -> str:
    """Return the user's `--set` options as to type them, each with a space before it."""
    return "".join(f" --set {shlex.quote(value)}" for value in overrides)


def name_run_file(text: str, run: str, overrides: Sequence[str] = ()) -> str:
    """Return a message whose commands on a run file are those to type, quoted for the shell.

    Args:
        text: As in "run `trainshort prepare`".
        run: The run file as the user named it.
        overrides: The values of the user's `--set` options.
    """
    return _COMMAND.sub(lambda match: f"{match[0]} {typed_path(run)}{typed_overrides(overrides)}", text)


@contextmanager
def run_file_named(run: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Name the run file in the commands that errors of the block tell the user to type; see `name_run_file`."""
    try:
        yield
    except TrainshortError as error:
        error.args = (name_run_file(str(error), run, overrides), *error.args[1:])
        raise
