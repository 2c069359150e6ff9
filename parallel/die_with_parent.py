"""Run a command that dies with its parent process: `python die_with_parent.py PARENT_PID COMMAND...`.

The parent-death signal is requested before exec and survives it. A preexec_fn would request it in the parent's
forked child, where running Python code is not safe. This file imports only the standard library, so that it adds
only milliseconds to a start.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def dying_with_parent(*command: str) -> list[str]:
    """Return a command line that becomes a command, which the kernel kills when the thread that started it ends."""
    # -I -S: the wrapper needs nothing from site-packages and starts faster without it.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def die_with_parent(arguments: list[str]) -> None:
    """Request SIGKILL at the parent's death, then become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # the parent died before prctl: no signal will come
        raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    die_with_parent(sys.argv[1:])
