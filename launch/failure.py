"""Report why a command failed, and end the process of a failed rank at once."""

import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from configs.errors import MachineError, TrainshortError
from configs.secrets import hide_secrets
from configs.terminal import printable
from launch.local import STOPPED_BY_HAND
from launch.show.streams import write_error

FLUSH_SECONDS = 5
# What a disk and its permissions refuse, whatever was to be done there.
_REFUSED_BY_DISK = {getattr(errno, name) for name in "EACCES EPERM EROFS ENOSPC EDQUOT EIO ESTALE ENAMETOOLONG".split()}


def report_failure(message: str, *, code: int) -> int:
    """Write an error message, none if it is empty, and return the exit code."""
    # Problems of a run file have a line each, indented. A line break in a user's text must not look like one.
    lines = "\n  ".join(map(printable, hide_secrets(message).split("\n  ")))
    write_error(f"error: {lines}\n" if message else "")
    return code


@contextmanager
def explain_refused_place() -> Iterator[None]:
    """Report a file or folder that may not be used here, and a current folder that goes: neither is our mistake.

    Raises:
        MachineError: names it.
    """
    try:
        yield
    except OSError as error:
        require_current_folder()
        if error.errno not in _REFUSED_BY_DISK or error.filename is None:
            raise
        raise MachineError(
            f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): fix that, or choose another place"
        ) from None


def require_current_folder() -> None:
    """Check that the current folder is there: in one that is gone, torch's library for matrices ends the process.

    Raises:
        MachineError: it is gone.
    """
    try:
        os.getcwd()
    except OSError:
        raise MachineError(
            "the folder in which this was started does not exist any more: change to one that does"
        ) from None


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process as soon as the code inside fails: report the error, then skip the interpreter's teardown.

    Teardown waits for threads, exit handlers and communicators, and these may wait for ranks that sit in a collective.
    On NCCL such ranks wait for as long as this process lives; whoever started them ends them once it is gone.
    """
    try:
        yield
    except BaseException as error:  # noqa: BLE001  also SystemExit and KeyboardInterrupt
        # Whatever blocks below, a full pipe or a lock that another thread holds, SIGALRM ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FLUSH_SECONDS)
        end_process(_report(error))


def end_process(code: int) -> NoReturn:
    """Write out what has been said, and end the process without the interpreter's teardown."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries in C have printed, NCCL's warnings among it
    os._exit(code)


def _report(error: BaseException) -> int:
    """Report an error as the command line or Python would, and return the exit code."""
    if isinstance(error, TrainshortError):
        return report_failure(str(error), code=error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED_BY_HAND
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        write_error(f"{error.code}\n")
        return 1
    # Not torch's own hook, which writes the rank before each line: the launcher and `runs` look for a traceback.
    sys.__excepthook__(type(error), error, error.__traceback__)
    return 1
