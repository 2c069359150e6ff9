"""A picture that is drawn again and again: on a terminal in place, with no mode of the terminal changed."""

import os
import pty
import re
import select
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.text import Text

from launch.show.refresh import refresh


@contextmanager
def screen(monkeypatch: pytest.MonkeyPatch, *, rows: int, columns: int, term: str) -> Iterator[int]:
    """Let standard output be a terminal, and yield what reads it."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (rows, columns))
    with os.fdopen(writer, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        patch.setenv("TERM", term)
        yield reader
    os.close(reader)


def shown_by_three(monkeypatch: pytest.MonkeyPatch, *, term: str) -> str:
    """Return what a terminal of 4 x 20 gets of three pictures, the last two alike, whose size changes each time."""
    drawn: list[int] = []

    def draw(columns: int) -> list[Text]:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(columns)
        signal.raise_signal(signal.SIGWINCH)  # the next picture does not wait for the minute
        return [Text(f"picture {min(len(drawn), 2)}", style="bold"), Text("a"), Text("b" * columns), Text("below")]

    before = signal.getsignal(signal.SIGWINCH)
    with screen(monkeypatch, rows=4, columns=20, term=term) as reader:
        with pytest.raises(KeyboardInterrupt):
            refresh(draw, seconds=60.0, environ={"TERM": term})
        read = b""
        while select.select([reader], [], [], 0)[0]:
            read += os.read(reader, 1 << 16)
    assert signal.getsignal(signal.SIGWINCH) == before
    assert drawn == [19, 19, 19], "a terminal may go to the next line after its last column"
    return read.decode()


def test_a_terminal_shows_the_newest_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_by_three(monkeypatch, term="xterm")
    assert shown.startswith("\r\n" * 3 + "\x1b[H"), "what was on the screen stays above"
    assert "\x1b[1m" in shown
    assert "\x1b[?" not in shown, "no mode of the terminal is changed, so none is left behind"
    pictures = re.sub(r"\x1b\[[\d;]*m", "", shown).split("\x1b[H")[1:]
    assert pictures == [f"picture {n}\x1b[K\r\na\x1b[K\r\n{'b' * 19}\x1b[K\r\n\x1b[J" for n in (1, 2, 2)]


def test_without_escape_codes_new_pictures_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = f"a\r\n{'b' * 19}\r\nbelow\r\n\r\n"
    assert shown_by_three(monkeypatch, term="dumb") == f"picture 1\r\n{rest}picture 2\r\n{rest}"
