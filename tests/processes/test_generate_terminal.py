"""`generate --interactive` on a terminal: lines are edited, Ctrl-C stops a text, Ctrl-D ends."""

import os
import pty
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_SECONDS, PROGRAM

OLD_RUN = str(Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0")
CTRL_C, CTRL_D, BACKSPACE = b"\x03", b"\x04", b"\x7f"
SPEED = r"(\d+) \+ (\d+) tokens \("


class Terminal:
    """A terminal that runs a command, with what it has shown so far."""

    def __init__(self, *arguments: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # the terminal of its session
        )
        os.close(theirs)
        os.set_blocking(self.end, False)
        self.shown = ""

    def type(self, keys: bytes) -> None:
        os.write(self.end, keys)

    def wait_for(self, pattern: str) -> None:
        """Wait until the rest of what is shown holds a pattern, and drop everything up to it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
            except (BlockingIOError, OSError):
                time.sleep(0.02)
        self.shown = self.shown[match.end() :]


@pytest.fixture
def terminal() -> "Iterator[Terminal]":
    terminal = Terminal("generate", OLD_RUN, "--interactive", "--greedy", "--tokens", "100000000")
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_ctrl_c_stops_the_text_and_ctrl_d_ends(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-D ends")
    for typed in (b"Onse" + 2 * BACKSPACE + b"ce\n", b"\n"):
        terminal.wait_for("> ")
        terminal.type(typed)
        terminal.wait_for(r"(?s).{200}")  # the continuation runs
        terminal.type(CTRL_C)
        terminal.wait_for(SPEED)
    terminal.wait_for("> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=PATIENCE_SECONDS) == 0
