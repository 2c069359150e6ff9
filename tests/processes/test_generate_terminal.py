"""`generate --interactive` on a terminal: lines are edited, Ctrl-C stops a text, Ctrl-D ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_terminal import CommandTerminal
from tests.support.processes import PATIENCE_SECONDS

OLD_RUN = str(Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0")
CTRL_C, CTRL_D, BACKSPACE = b"\x03", b"\x04", b"\x7f"
SPEED = r"(\d+) \+ (\d+) tokens \("


@pytest.fixture
def terminal() -> Iterator[CommandTerminal]:
    terminal = CommandTerminal("generate", OLD_RUN, "--interactive", "--greedy", "--tokens", "100000000")
    try:
        yield terminal
    finally:
        terminal.close()


def test_ctrl_c_stops_the_text_and_ctrl_d_ends(terminal: CommandTerminal) -> None:
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
