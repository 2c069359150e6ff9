"""A picture on the terminal that is redrawn in place.

It changes no mode of the terminal, so nothing has to be restored, however the command ends.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.text import Text

from launch.show.streams import can_redraw, write_output

_HOME, _CLEAR_REST_OF_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"

Draw = Callable[[int], Sequence[Text]]
"""Returns the lines of a picture of the given width in columns."""


def refresh(draw: Draw, *, seconds: float, environ: Mapping[str, str]) -> None:
    """Draw a picture on standard output, a terminal, until Ctrl-C; again at once when its size changes.

    On one that takes no escape codes, a picture that differs is written below the one before.

    Args:
        draw: Makes the picture.
        seconds: Time from one picture to the next.
        environ: Environment, whose TERM says what the terminal takes.
    """
    redraws, shown = can_redraw(sys.stdout, environ=environ), ""
    with _resizing() as resized:
        if redraws:
            write_output("\n" * (_size()[1] - 1))  # what was on the screen stays above it
        while True:
            resized.clear()
            columns, rows = _size()
            lines = draw(columns - 1)  # a terminal may go to the next line after its last column
            if redraws:
                text = _in_place(lines, rows=rows, columns=columns)
            else:
                text = "".join(f"{line.plain.rstrip()}\n" for line in lines)
            if (redraws or text != shown) and not write_output(text if redraws else f"{text}\n"):
                return  # nobody reads it any more
            shown = text
            resized.wait(seconds)


def _in_place(lines: Sequence[Text], *, rows: int, columns: int) -> str:
    """Return what draws lines over the picture before; those that the screen has no room for are left out."""
    console = Console(width=columns, markup=False, emoji=False, highlight=False)
    text = _HOME
    for line in lines[: rows - 1]:
        with console.capture() as captured:
            console.print(line, end="", no_wrap=True, overflow="crop")
        text += f"{captured.get()}{_CLEAR_REST_OF_LINE}\n"  # of rich, a line would be cut inside of the escape code
    return text + _CLEAR_BELOW


def _size() -> tuple[int, int]:
    with suppress(OSError):
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        return columns or 80, rows or 24
    return 80, 24


@contextmanager
def _resizing() -> Iterator[threading.Event]:
    """Yield an event that is set when the terminal's size changes."""
    resized = threading.Event()
    before = signal.signal(signal.SIGWINCH, lambda *_: resized.set())
    try:
        yield resized
    finally:
        signal.signal(signal.SIGWINCH, before)
