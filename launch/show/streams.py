"""The standard streams: any encoding, a closed pipe and a full disk end no command in a traceback."""

import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from configs.errors import MachineError
from configs.terminal import PrintableFormatter, Terminal

_OURS = ("configs", "data_pipeline", "launch", "parallel", "training")


def ready_streams() -> None:
    """Let the standard streams take any text: what their encoding lacks is shown as an escape, such as \\u20ac.

    Our loggers write to standard error, with control characters escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command, as with >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _use_handlers(Terminal())


@contextmanager
def following(log: Path | None, *, descriptor: int | None, environ: Mapping[str, str]) -> Iterator[Terminal]:
    """Write log records to the terminal and to the run's log, the same lines, while the block runs.

    The log also gets the lines that `--quiet` hides, and what `write_error` writes.

    Args:
        log: RUN_DIR/logs/rank_0.log, in a folder that exists; None for none.
        descriptor: File descriptor of the terminal, as the launcher hands it to rank 0; None for standard error.
        environ: Environment, whose TERM says whether a line can be written again.
    Yields:
        The terminal, for a live line.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = sys.stderr if descriptor is None else open(descriptor, "w", errors="backslashreplace")
    terminal = Terminal(stream, redraws=can_redraw(stream, environ=environ))
    terminal.setLevel(level)
    root.setLevel(min(level, logging.INFO))
    _use_handlers(terminal)
    with suppress(OSError):  # without a log of its own, the run is still told on the terminal
        if log is not None and not _is_file(stream, log):  # as it is in a batch job
            _use_handlers(_LogFile(log), terminal)  # the file first: it is whole
    try:
        yield terminal
    except BaseException:
        terminal.show("")
        raise  # the handlers stay: the report of the error belongs to the log too
    terminal.show("")
    _use_handlers(*handlers)
    root.setLevel(level)
    if descriptor is not None:
        with suppress(OSError):
            stream.close()


def can_redraw(stream: TextIO, *, environ: Mapping[str, str]) -> bool:
    """Return whether a stream is a terminal on which a line can be written again."""
    return stream.isatty() and environ.get("TERM") not in ("dumb", "unknown", "")


def _use_handlers(*handlers: logging.Handler) -> None:
    """Replace our handlers of the root logger; those of others stay."""
    root = logging.getLogger()
    for installed in [each for each in root.handlers if isinstance(each, Terminal | _LogFile)]:
        root.removeHandler(installed)
        if installed not in handlers:
            with suppress(OSError):  # a full disk
                installed.close()
    for handler in handlers:
        if isinstance(handler, Terminal | _LogFile):
            handler.addFilter(_is_shown)
            root.addHandler(handler)


def _is_shown(record: logging.LogRecord) -> bool:
    """Return whether to show a record: libraries say warnings only, unless `--verbose` asks for all of it."""
    if record.levelno >= logging.WARNING or logging.getLogger().isEnabledFor(logging.DEBUG):
        return True
    return record.name.partition(".")[0] in _OURS


class _LogFile(logging.FileHandler):
    """Appends records to a file; while it cannot be written, they wait in memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(PrintableFormatter())

    def copy_error(self, text: str) -> None:
        """Append what is written to standard error, if that is another file."""
        if self.stream is not None and not _is_file(sys.stderr, Path(self.baseFilename)):
            with suppress(OSError, ValueError):
                self.stream.write(text)
                self.stream.flush()

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _is_file(stream: TextIO, path: Path) -> bool:
    with suppress(OSError, ValueError):
        return path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


def write_output(output: str | bytes) -> bool:
    """Write to standard output: text in its encoding, bytes as they are; return whether somebody may have read it.

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
        return True
    except BrokenPipeError:
        _drop_output()
        return False
    except OSError as error:
        _drop_output()
        raise MachineError(
            f"standard output cannot be written ({error.strerror}): free space, or write it elsewhere"
        ) from None


def write_error(text: str) -> None:
    """Write to standard error, after what was written to standard output; if it cannot be written, drop it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Terminal):
            handler.clear()
        elif isinstance(handler, _LogFile):
            handler.copy_error(text)
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
