"""The standard streams: any encoding, a closed pipe and a full disk end no command in a traceback."""

import io
import logging
import os
import sys
from contextlib import suppress

from configs.errors import MachineError
from configs.terminal import printable


def ready_streams() -> None:
    """Let the standard streams take any text: what their encoding lacks is shown as an escape, such as \\u20ac.

    Control characters in warnings, which may hold names of files, are escaped too.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command, as with >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # it writes the warnings: we set up no other handler
        logging.lastResort.setFormatter(_PrintableFormatter())


class _PrintableFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        # a library's message may have several lines
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


def write_output(output: str | bytes) -> None:
    """Write to standard output: text in its encoding, bytes as they are.

    A reader that has gone, as in `| head -1`, has seen enough: the rest is dropped, and the command goes on.

    Raises:
        MachineError: standard output cannot be written, for example because the disk is full.
    """
    try:
        if isinstance(output, bytes):
            sys.stdout.flush()  # text that was written before
            sys.stdout.buffer.write(output)
        else:
            sys.stdout.write(output)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        _drop_output()
        raise MachineError(
            f"standard output cannot be written ({error.strerror}): free space, or write it elsewhere"
        ) from None


def write_error(text: str) -> None:
    """Write to standard error, after what was written to standard output; if nobody can read it, drop it."""
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _drop_output() -> None:
    """Send what is written from now on to nowhere; otherwise Python would report what is left when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
