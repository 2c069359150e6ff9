"""Exceptions whose cause a user can fix. The command line prints each as one message, with its exit code.

A message that tells the user to type `trainshort prepare` or `trainshort train` leaves out the run file: most code does
not know its name. The command line, which does, completes the message.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class TrainshortError(Exception):
    """Base class. The message says what is wrong, the value seen and what to do."""

    exit_code = 1


class InputError(TrainshortError):
    """The user's input is wrong: a run file, an option, a data file, a folder."""

    exit_code = 2


class MachineError(TrainshortError):
    """The machine lacks something: a library, a device, memory, disk."""

    exit_code = 3


class LostPeers(TrainshortError):
    """A rank failed only because another one has ended, which has the cause: the launcher looks for that one."""

    exit_code = 4


_COMMAND = re.compile(r"`trainshort (?:prepare|train)(?=`| --)")


def name_run_file(text: str, run: str, overrides: Sequence[str] = ()) -> str:
    """Return a message whose commands on a run file are those to type, quoted for the shell.

    Args:
        text: As in "run `trainshort prepare`".
        run: The run file as the user named it.
        overrides: The values of the user's `--set` options.
    """
    # a name that begins with a dash would be read as an option
    words = [f"./{run}" if run.startswith("-") else run, *(word for value in overrides for word in ("--set", value))]
    return _COMMAND.sub(lambda match: f"{match[0]} {shlex.join(words)}", text)


@contextmanager
def run_file_named(run: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Name the run file in the commands that errors of the block tell the user to type; see `name_run_file`."""
    try:
        yield
    except TrainshortError as error:
        error.args = (name_run_file(str(error), run, overrides), *error.args[1:])
        raise
