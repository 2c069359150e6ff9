"""Show text on a terminal as it is: no markup, no emoji codes, and nothing that controls the terminal."""

import logging
import os
import re
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

# Control characters, line and paragraph separators, and halves of surrogate pairs: bytes of a name that is not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
CLEAR_LINE = "\r\x1b[2K"


def printable(text: str) -> str:
    r"""Return text for one line of a message; what would break or steer the line is escaped: \n, \x1b, \udcff."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class PrintableFormatter(logging.Formatter):
    """Format a record as its message, with control characters escaped: it may hold names of files."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message; one of a library may have several lines."""
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


class Terminal(logging.Handler):
    """Show records on a stream and, on a terminal, one live line below them.

    What cannot be written is dropped: a full disk or a closed terminal must not end long work. What a given stream does
    not take at once is dropped too: ranks must not wait for a stopped terminal or an unread pipe.

    Args:
        stream: Where to write without blocking; None for what standard error is at each record, as progress bars
            replace it.
        redraws: Whether the stream is a terminal on which a line can be written again.
    """

    def __init__(self, stream: TextIO | None = None, *, redraws: bool = False) -> None:
        super().__init__()
        self.setFormatter(PrintableFormatter())
        self._stream, self._redraws, self._live = stream, redraws, ""
        self._own = None if stream is None else _open_again(stream)
        self._descriptor = _descriptor_of(stream) if stream is not None and self._own is None else self._own
        self._unsent = b""  # of a line that has been begun

    @property
    def columns(self) -> int | None:
        """Columns of the terminal; None where lines may have any length: in a file and in a pipe."""
        if not self._redraws:
            return None
        with suppress(OSError, ValueError):
            return os.get_terminal_size((self._stream or sys.stderr).fileno()).columns or None
        return None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the live line."""
        try:
            self._write(f"{self.format(record)}\n{self._live}")
        except Exception:  # noqa: BLE001  as logging's own handlers: a wrong record must not end the program
            self.handleError(record)

    def show(self, text: str) -> None:
        """Replace the live line; an empty text removes it. There is none with `--quiet`."""
        if not self._redraws or self.level > logging.INFO or text == self._live:
            return
        self.acquire()
        try:
            self._live = text
            self._write(text)
        finally:
            self.release()

    def clear(self) -> None:
        """Erase the live line, also that of another process, before text is written to the stream directly."""
        if self._redraws:
            self._write("")

    def close(self) -> None:
        """Close what the handler has opened, not the stream."""
        own, self._own = self._own, None
        if own is not None:
            self._descriptor = None
            os.close(own)
        super().close()

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        text = f"{CLEAR_LINE}{text}" if self._redraws else text
        with suppress(OSError, ValueError):
            if self._descriptor is not None:
                self._send(text.encode(stream.encoding, "backslashreplace"), descriptor=self._descriptor)
                return
            stream.write(text)
            stream.flush()

    def _send(self, data: bytes, *, descriptor: int) -> None:
        self._unsent = _write_at_once(descriptor, self._unsent)
        if not self._unsent:
            rest = _write_at_once(descriptor, data)
            self._unsent = rest if len(rest) < len(data) else b""


def _descriptor_of(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError):
        return stream.fileno()
    return None


def _open_again(stream: TextIO) -> int | None:
    """Open a terminal again, without blocking; None if the stream is not a terminal, or is another user's.

    A terminal that is ready may still take less than a line, and a write of the rest would block. The open file of the
    stream itself is shared with the user's shell, which O_NONBLOCK would break.
    """
    descriptor = _descriptor_of(stream)
    if descriptor is None or not os.isatty(descriptor):
        return None
    with suppress(OSError):
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return None


def _write_at_once(descriptor: int, data: bytes) -> bytes:
    """Write what a descriptor takes without blocking, and return the rest; a pipe that is ready takes PIPE_BUF."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    with suppress(BlockingIOError):
        while data and any(events & select.POLLOUT for _, events in poll.poll(0)):
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]
    return data


def status_console(*, quiet: bool = False) -> "Console":
    """Return a console on standard error for progress and notes; writes that fail are dropped.

    Args:
        quiet: Whether to show nothing; `--quiet` hides it too.
    """
    from rich.console import Console  # here: every command imports this module, and few show progress

    file = cast("TextIO", _BestEffort(sys.stderr))
    quiet = quiet or not logging.getLogger().isEnabledFor(logging.INFO)
    return Console(file=file, quiet=quiet, highlight=False, markup=False, emoji=False)


class _BestEffort:
    """A stream whose failed writes are dropped: a full disk or a closed pipe must not end long work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
