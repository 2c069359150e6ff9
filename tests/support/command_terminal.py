"""A terminal on which a process runs one command: type to it, and wait for what it shows."""

import os
import pty
import re
import subprocess
import time

from tests.support.processes import PATIENCE_SECONDS, PROGRAM


class CommandTerminal:
    """A terminal that runs a command, with what it has shown so far; `term` is its TERM."""

    def __init__(self, *arguments: str, term: str = "dumb") -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": term},
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

    def close(self) -> None:
        """End the command."""
        self.process.kill()
        self.process.wait()
        os.close(self.end)
