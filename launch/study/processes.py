"""Run the commands of a study, one at a time, each in a process of its own, and pass requests to stop on to it."""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.commands import command_here
from configs.errors import MachineError
from launch.show.train import verbosity_options
from launch.stop_signals import stop_signals_handled
from parallel.die_with_parent import dying_with_parent

logger = logging.getLogger(__name__)


class Commands:
    """Runs commands of trainshort. Each dies with this process, also when that is killed with SIGKILL.

    A command has a session of its own, so that a terminal's Ctrl-C reaches it once: from here.

    Attributes:
        asked: Requests to stop so far.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._process: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, _frame: Any) -> None:
        """Pass a request to stop on to the command that runs: `train` saves, and a second Ctrl-C ends it at once."""
        self.asked += 1
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, *arguments: str) -> int:
        """Run a command to its end, with this process's verbosity, and return its exit code; 3 if a signal ended it.

        What it prints goes to standard error: the result of a study is its table.
        """
        command = command_here(*verbosity_options(), *arguments)
        self._process = subprocess.Popen(
            dying_with_parent(*command),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            start_new_session=True,
        )
        if self.asked:  # a signal came while it was being started
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        if code < 0 and not self.asked:
            name = signal.Signals(-code).name
            logger.warning("trainshort %s was killed by %s: check whether memory ran out", arguments[0], name)
        return code if code >= 0 else MachineError.exit_code


@contextmanager
def commands_until_asked() -> Iterator[Commands]:
    """Yield what runs commands; SIGINT, SIGTERM and SIGHUP meanwhile are passed on to them, and end nothing here."""
    commands = Commands()
    with stop_signals_handled(commands.handle):
        yield commands
