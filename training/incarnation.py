"""Which start of a run may write: RUN_DIR/incarnation names the newest, and an older one that still lives stops itself.

A scheduler may take a job for dead whose ranks still write, and start it again on other nodes. Nobody can end those
ranks from here; but each looks at this file before it writes a line of metrics, opens a file of a checkpoint,
publishes one or removes one.
"""

import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from configs.errors import InputError, MachineError
from configs.files import whole_file
from configs.paths import incarnation_file, stop_file

ENDING_SECONDS = 5.0  # that the ranks of a start that was just killed may need to go


class Superseded(MachineError):
    """A newer start of the same run has taken over."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a run.

    Attributes:
        number: Starts of the run folder, this one included.
        token: What its files are marked with, like no other start's.
        host: Name of the machine of rank 0.
        machine: That machine since it was booted, and the process's name space in it.
        pid: Process of rank 0.
        process_started: When the kernel started it, in ticks since the boot: a pid alone may be used again.
        started_at: Local time.
    """

    number: int
    token: str
    host: str
    machine: str
    pid: int
    process_started: int
    started_at: str


@dataclass(frozen=True)
class Fence:
    """What tells one start of a run whether it is still the newest."""

    run_dir: Path
    token: str

    def is_ours(self) -> bool:
        """Return whether no newer start has taken over; ask it before what cannot be undone.

        Raises:
            OSError: the disk does not tell.
        """
        newest = _load(self.run_dir)
        return newest is None or newest.token == self.token

    def may_be_ours(self) -> bool:
        """Return whether no newer start is seen; a disk that does not tell ends no training."""
        newest = read(self.run_dir)
        return newest is None or newest.token == self.token

    def check(self) -> None:
        """Refuse to go on beside a newer start.

        Raises:
            Superseded: there is one.
            OSError: the disk does not tell.
        """
        if not self.is_ours():
            raise self.superseded()

    def may_remove(self, mark: str) -> bool:
        """Return whether what is marked so, a token first, is of this start or of an older one, or of none."""
        number = re.match(r"\d+(?=-)", mark)
        older = number is None or int(number[0]) < int(self.token.partition("-")[0])
        return older or mark.startswith(self.token)

    def superseded(self) -> Superseded:
        """Return the error of a start that is not the newest."""
        newest = read(self.run_dir)
        where = f"on {newest.host} at {newest.started_at}" if newest else "since"
        return Superseded(
            f"{self.run_dir} was started again {where}, and this older start ({self.token}) ends here without writing "
            "more: nothing to do if that was meant; else end the newer one and start again"
        )


def begin(run_dir: Path) -> Fence:
    """Take over a run folder, which must exist: from now on this is the newest start.

    Raises:
        OSError: the folder cannot be written.
    """
    before = read(run_dir)
    number = before.number + 1 if before else 1
    token = f"{number}-{secrets.token_hex(4)}"
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    pid = os.getpid()
    mine = Incarnation(number, token, socket.gethostname(), _machine(), pid, _started(pid) or 0, now)
    with whole_file(incarnation_file(run_dir), mark=f".{token}") as temporary:
        temporary.write_text(json.dumps(asdict(mine), indent=1) + "\n", encoding="utf-8")
    return Fence(run_dir, token)


def refuse_second_start(run_dir: Path) -> None:
    """Refuse to start beside a start that is alive on this machine; of other machines nothing is known here.

    Raises:
        InputError: it is, and does not end within a few seconds.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while (other := read(run_dir)) and _is_alive(other):
        if time.monotonic() > deadline:
            raise InputError(
                f"{run_dir} is being trained by process {other.pid} on this machine since {other.started_at}: "
                f"wait for it, or end it (`touch {stop_file(run_dir)}` lets it save), or choose another run.dir"
            )
        time.sleep(0.1)


@contextmanager
def sole_launcher(run_dir: Path) -> Iterator[None]:
    """Hold a run folder against other launchers of this machine until this one ends, however it ends.

    Before its ranks are built no start is known by `incarnation`. A file system that has no such lock holds nobody.

    Raises:
        InputError: another launcher holds it.
    """
    handle = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(cast("int", handle))
        raise InputError(
            f"{run_dir} is being started by another `trainshort train` on this machine: wait for it, or end it, "
            "or choose another run.dir"
        ) from None
    except OSError:
        pass  # a folder that cannot be made is reported when the logs are
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def read(run_dir: Path) -> Incarnation | None:
    """Return the newest start of a run folder, None where there is none or the disk does not tell."""
    try:
        return _load(run_dir)
    except OSError:
        return None


def _load(run_dir: Path) -> Incarnation | None:
    try:
        found: dict[str, Any] = json.loads(incarnation_file(run_dir).read_text(encoding="utf-8"))
        return Incarnation(**found)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(other: Incarnation) -> bool:
    return other.machine == _machine() and _started(other.pid) == other.process_started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """Return when a process was started, in ticks since the boot; None for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else int(fields[18])
