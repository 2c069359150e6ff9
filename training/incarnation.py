"""Which start of a run may write: RUN_DIR/incarnation records the newest, and an older one that is alive stops itself.

A scheduler may give up on a job whose ranks still run, and start it again on other nodes. The new start cannot end
those ranks. So each start checks this file before it writes a line of metrics, opens a file of a checkpoint, renames a
checkpoint into place or removes one.
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
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from configs.commands import typed_path
from configs.errors import InputError, MachineError
from configs.files import write_json
from configs.paths import incarnation_file, stop_file

EXIT_SECONDS = 5.0  # time for the ranks of a start that was just killed to exit


class Superseded(MachineError):
    """A newer start of the same run has taken over."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a run.

    Attributes:
        number: How many times the run was started, including this time.
        token: Unique mark of this start's files; begins with the number.
        host: Name of rank 0's machine.
        machine: Its boot id and pid namespace: within them a pid names one process at a time.
        pid: Process of rank 0.
        process_started: Start of that process in clock ticks since the boot: a pid may be reused.
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
    """Shows whether one start of a run is still the newest."""

    run_dir: Path
    token: str

    def is_ours(self) -> bool:
        """Return whether no newer start has taken over; use it before an action that cannot be undone.

        Raises:
            OSError: the disk cannot be read.
        """
        newest = _load(self.run_dir)
        return newest is None or newest.token == self.token

    def may_be_ours(self) -> bool:
        """Return whether no newer start is seen; a disk that cannot be read must not end training."""
        newest = newest_incarnation(self.run_dir)
        return newest is None or newest.token == self.token

    def check(self) -> None:
        """Stop a start that is no longer the newest.

        Raises:
            Superseded: a newer start has taken over.
            OSError: the disk cannot be read.
        """
        if not self.is_ours():
            raise self.superseded()

    def may_remove(self, mark: str) -> bool:
        """Return whether a file's mark is this start's, an older start's, or no start's.

        Args:
            mark: Part of the file's name that begins with the token of the start that wrote it.
        """
        number = re.match(r"\d+(?=-)", mark)
        older = number is None or int(number[0]) < int(self.token.partition("-")[0])
        return older or mark.startswith(self.token)

    def superseded(self) -> Superseded:
        """Return the error that ends a start that is not the newest."""
        newest = newest_incarnation(self.run_dir)
        where = f"on {newest.host} at {newest.started_at}" if newest else "since"
        return Superseded(
            f"{self.run_dir} was started again {where}, and this older start ({self.token}) stops without writing "
            "more; if that was not intended, end the newer start and resume with `trainshort train`"
        )


def begin_incarnation(run_dir: Path) -> Fence:
    """Make this process the newest start of a run folder, which must exist.

    Raises:
        OSError: the folder cannot be written.
    """
    before = newest_incarnation(run_dir)
    number = before.number + 1 if before else 1
    token = f"{number}-{secrets.token_hex(4)}"
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    pid = os.getpid()
    this = Incarnation(number, token, socket.gethostname(), _machine(), pid, _process_started(pid) or 0, now)
    write_json(incarnation_file(run_dir), asdict(this), mark=f".{token}")
    return Fence(run_dir, token)


def refuse_second_start(run_dir: Path) -> None:
    """Refuse to start while another start is alive on this machine. A start on another machine cannot be seen.

    Raises:
        InputError: one is alive, and does not exit within a few seconds.
    """
    deadline = time.monotonic() + EXIT_SECONDS
    while (other := newest_incarnation(run_dir)) and _is_alive(other):
        if time.monotonic() > deadline:
            raise InputError(
                f"{run_dir} is being trained by process {other.pid} on this machine since {other.started_at}: "
                f"wait for it, or end it (`touch {typed_path(stop_file(run_dir))}` lets it save), or choose "
                "another run.dir"
            )
        time.sleep(0.1)


def has_ended(run_dir: Path) -> bool:
    """Return whether the newest start of a run folder ran on this machine and has ended, by a reboot too."""
    newest = newest_incarnation(run_dir)
    if newest is None:
        return False
    boot, now = newest.machine.partition(" ")[0], _machine().partition(" ")[0]
    rebooted = newest.host == socket.gethostname() and re.fullmatch("[0-9a-f-]{36}", boot) and boot != now
    return died_here(run_dir) or bool(rebooted)


def may_run(run_dir: Path) -> bool:
    """Return whether there is a start of a run folder, and the newest is not known to have ended."""
    return newest_incarnation(run_dir) is not None and not has_ended(run_dir)


def runs_here(run_dir: Path) -> bool:
    """Return whether the newest start of a run folder runs on this machine."""
    newest = newest_incarnation(run_dir)
    return newest is not None and _is_alive(newest)


def died_here(run_dir: Path) -> bool:
    """Return whether the newest start of a run folder ran on this machine and has ended."""
    newest = newest_incarnation(run_dir)
    return newest is not None and newest.machine == _machine() and not _is_alive(newest)


@contextmanager
def sole_launcher(run_dir: Path) -> Iterator[None]:
    """Keep other launchers of this machine out of a run folder until this one ends, even by SIGKILL.

    Covers the time before the ranks are built, when `incarnation` does not record the start yet. Does nothing on a
    file system without such locks.

    Raises:
        InputError: another launcher holds the folder.
    """
    handle = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(cast("int", handle))
        raise InputError(
            f"{run_dir} is being started by another process on this machine: wait for it, or end it, or choose another "
            "run.dir"
        ) from None
    except OSError:
        pass  # a folder that cannot be made is reported when the logs are written
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def newest_incarnation(run_dir: Path) -> Incarnation | None:
    """Return the newest start of a run folder; None if there is none or the disk cannot be read."""
    try:
        return _load(run_dir)
    except OSError:
        return None


def _load(run_dir: Path) -> Incarnation | None:
    """Return the newest start; None if there is none or its file is damaged, which must not stop any start."""
    try:
        values: dict[str, Any] = json.loads(incarnation_file(run_dir).read_text(encoding="utf-8"))
        start = Incarnation(**values)
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    is_whole = all(type(getattr(start, field.name)) is field.type for field in fields(start))
    return start if is_whole else None


def _is_alive(other: Incarnation) -> bool:
    return other.machine == _machine() and _process_started(other.pid) == other.process_started


def _machine() -> str:
    # The boot id rules out pids from before a reboot, the namespace those of another container.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_started(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot; None for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may contain spaces
    return None if state in "ZX" else int(fields[18])  # field 22 of proc(5): starttime
