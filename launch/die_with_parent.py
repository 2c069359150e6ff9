"""Run a command that dies with the process that asked for it: `python tether.py PARENT_PID COMMAND...`.

The kernel is asked before the command is executed, and the wish survives exec. A preexec_fn would do the same
inside the launcher's fork, where Python code is not safe. This file imports only the standard library, so that
it adds some milliseconds to a start.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel knew of the wish
        raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
