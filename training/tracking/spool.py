"""The spool of a run folder, RUN_DIR/tracking: what MLflow is to be told, in order. Imports no mlflow.

Each process that has something to tell appends to a file of its own, one JSON object a line, numbered. So no two
processes, perhaps on two nodes with a network disk, write to one file, and a torn line is always a file's last. Whoever
sends reads the files in the order of their names, which begin with the number of the run's start.

A line is in the page cache once `put` returns, so that it survives SIGKILL. It is flushed to disk before a checkpoint
is saved: after a power cut, the steps since that checkpoint are trained and told again.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import whole_file
from configs.paths import spool_folder
from training.incarnation import newest_incarnation

Event = dict[str, Any]

# the role of the process that trains, in the names of its files
TRAINS = "train"
# a file of this size is followed by a new one, so that it can be removed once it is sent
ROTATE_BYTES = 4_000_000
# what an unwritable disk lets pile up in memory
MOST_IN_MEMORY = 100_000
# larger files are sent as they are when their turn comes, not copied
_COPIED_BYTES = 64_000_000
RETRY_WRITE_SECONDS = 1.0
_TAIL_BYTES = 500
_ABANDONED_SECONDS = 7 * 24 * 3600.0
_CLOSED = "closed"  # kind of a file's last line: its writer appends no more


@dataclass(frozen=True)
class SpoolPosition:
    """How far a file of the spool was sent.

    Attributes:
        number: Number of the last event.
        offset: Byte behind its line; a line before it may be skipped without being read.
    """

    number: int = 0
    offset: int = 0


def now_ms() -> int:
    """Return the time of an event: the milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class SpoolWriter:
    """Appends one process's events to the spool. Safe to use from several threads; raises nothing.

    While the disk cannot be written, events wait in memory, where `waiting` shows them to this process's sender.
    """

    def __init__(self, run_dir: Path, *, role: str, on_problem: Callable[[str], None]) -> None:
        """Choose a file; it is made when the first event comes.

        Args:
            run_dir: The run folder.
            role: What the process does, in a word; TRAINS for rank 0.
            on_problem: Told in words when events cannot be written.
        """
        self._folder, self._on_problem = spool_folder(run_dir), on_problem
        newest = newest_incarnation(run_dir)
        host = socket.gethostname().partition(".")[0]
        start, now = newest.number if newest else 0, now_ms()
        self._stem = f"{start:06d}-{now}-{host}-{role}-{secrets.token_hex(3)}"
        self._part, self._size, self._number = 0, 0, 0
        self._handle: int | None = None
        self._memory: deque[tuple[int, bytes]] = deque()
        self._failed_at: float | None = None
        self._is_torn = self._is_closed = False
        self._lock = threading.Lock()

    @property
    def file(self) -> Path:
        """The file that is written to now."""
        return self._folder / f"{self._stem}-{self._part:04d}.jsonl"

    def put(self, event: Mapping[str, Any]) -> None:
        """Append an event, a JSON-able dictionary with its `kind`."""
        with self._lock:
            if self._is_closed:
                return
            if len(self._memory) >= MOST_IN_MEMORY:
                self._on_problem(f"has {MOST_IN_MEMORY} records in memory: further ones are dropped")
                return
            if self._size > ROTATE_BYTES and not self._memory:
                self._end_file()
                self._part, self._size = self._part + 1, 0
            self._number += 1
            line = json.dumps({"n": self._number, **event}, default=str).encode() + b"\n"
            self._memory.append((self._number, line))
            self._try_to_write()

    def keep_file(self, path: Path) -> Path:
        """Copy a file that may be replaced before it is sent; return the copy, or the file if it cannot be copied."""
        folder = self._folder / "files" / f"{self._stem}-{secrets.token_hex(4)}"
        try:
            if path.stat().st_size > _COPIED_BYTES:
                return path
            folder.mkdir(parents=True)
            return Path(shutil.copyfile(path, folder / path.name))
        except OSError:
            with suppress(OSError):
                shutil.rmtree(folder)
            return path

    def waiting(self) -> list[Event]:
        """Return the events that are in memory because they could not be written."""
        with self._lock:
            return [json.loads(line) for _, line in self._memory]

    def forget(self, number: int) -> None:
        """Remove events up to a number from memory: they were sent."""
        with self._lock:
            while self._memory and self._memory[0][0] <= number:
                self._memory.popleft()

    def flush(self) -> None:
        """Flush what was written to disk."""
        with self._lock, suppress(OSError):
            self._write()
            if self._handle is not None:
                os.fsync(self._handle)

    def show_life(self) -> None:
        """Touch the file: `track sync` on another machine sees that this process is alive."""
        with self._lock, suppress(OSError):
            if self._handle is not None:
                os.utime(self._handle)

    def close(self) -> None:
        """Write what is left and close the file; later events are ignored."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            with suppress(OSError):
                self._write()
            self._end_file()

    def _end_file(self) -> None:
        if self._handle is None:
            return
        with suppress(OSError):
            os.write(self._handle, json.dumps({"n": self._number, "kind": _CLOSED}).encode() + b"\n")
            os.fsync(self._handle)
        os.close(self._handle)
        self._handle = None

    def _try_to_write(self) -> None:
        if self._failed_at is not None and time.monotonic() - self._failed_at < RETRY_WRITE_SECONDS:
            return
        try:
            self._write()
            self._failed_at = None
        except OSError as error:
            if self._failed_at is None:
                self._on_problem(f"cannot be told through {self._folder} ({error.strerror}): records wait in memory")
            self._failed_at = time.monotonic()

    def _write(self) -> None:
        if not self._memory:
            return
        if self._handle is None:
            self._handle = self._open()
        data = b"".join(line for _, line in self._memory)
        if self._is_torn:
            os.ftruncate(self._handle, self._size)  # remove a partial line that a full disk left
        self._is_torn = True
        written = os.write(self._handle, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_torn = False
        self._size += written
        self._memory.clear()

    def _open(self) -> int:
        self._folder.mkdir(exist_ok=True)
        # locked before it has its name: an unlocked file of this machine has no writer any more
        temporary = self.file.with_suffix(".new")
        handle = os.open(temporary, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.rename(self.file)
        return handle


class SentPositions:
    """How far each file of a spool was sent, by lane: RUN_DIR/tracking/sent.json."""

    def __init__(self, run_dir: Path) -> None:
        self._file = spool_folder(run_dir) / "sent.json"
        self._positions: dict[str, dict[str, SpoolPosition]] = {}
        self._is_saved = True

    def read(self) -> bool:
        """Read the file; return whether another process has changed it since this one read or wrote it."""
        if not self._is_saved:  # a disk that was full: what is in memory is newer
            self.save()
            return False
        try:
            document = json.loads(self._file.read_text(encoding="utf-8"))
            positions = {
                name: {lane: SpoolPosition(*numbers) for lane, numbers in lanes.items()}
                for name, lanes in document.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            positions = {}
        if positions == self._positions:
            return False
        self._positions = positions
        return True

    def of(self, file: str, *, lane: str) -> SpoolPosition:
        """Return how far a file was sent in a lane."""
        return self._positions.get(file, {}).get(lane, SpoolPosition())

    def set(self, file: str, position: SpoolPosition, *, lane: str) -> None:
        """Note how far a file was sent; `save` writes it."""
        if self.of(file, lane=lane) != position:
            self._positions.setdefault(file, {})[lane] = position
            self._is_saved = False

    def forget(self, file: str) -> None:
        """Forget a file that was removed."""
        if self._positions.pop(file, None) is not None:
            self._is_saved = False

    def save(self) -> None:
        """Write the file; if the disk is full, this process remembers, and the last request's tag on the server."""
        if self._is_saved:
            return
        document = {
            name: {lane: [place.number, place.offset] for lane, place in lanes.items()}
            for name, lanes in self._positions.items()
        }
        with suppress(OSError), whole_file(self._file) as temporary:
            temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
            self._is_saved = True


def spool_files(run_dir: Path) -> list[Path]:
    """Return the files of a spool, oldest first."""
    return sorted(spool_folder(run_dir).glob("*.jsonl"))


def trainer_files(run_dir: Path) -> list[Path]:
    """Return the files of a spool that the training processes have written, oldest first."""
    return [file for file in spool_files(run_dir) if file.name.split("-")[-3] == TRAINS]  # a host may be called so


def has_told_end(run_dir: Path) -> bool:
    """Return whether the newest start of a run has put into the spool how it ended."""
    newest = newest_incarnation(run_dir)
    files = [file for file in trainer_files(run_dir) if newest and file.name.startswith(f"{newest.number:06d}-")]
    return bool(files) and b'"kind": "finish"' in _tail(files[-1])


def read_events(file: Path, position: SpoolPosition) -> Iterator[tuple[Event, SpoolPosition]]:
    """Yield the events of a file behind a position, each with the position behind it.

    A damaged line is skipped. A torn last line is not read: its writer may be about to finish it.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with file.open("rb") as handle:
            handle.seek(position.offset)
            lines = handle.read().split(b"\n")
    except FileNotFoundError:
        return
    offset = position.offset
    for line in lines[:-1]:
        offset += len(line) + 1
        try:
            event = json.loads(line)
            number, kind = int(event["n"]), event["kind"]
        except (ValueError, TypeError, KeyError):
            continue
        if number > position.number and kind != _CLOSED:
            yield event, SpoolPosition(number, offset)


def is_closed(file: Path) -> bool:
    """Return whether a file of the spool has no writer any more."""
    if f'"kind": "{_CLOSED}"'.encode() in _tail(file):
        return True
    try:
        with file.open("rb+") as handle:
            if time.time() - os.fstat(handle.fileno()).st_mtime > _ABANDONED_SECONDS:
                return True
            if f"-{socket.gethostname().partition('.')[0]}-" not in file.name:
                return False  # a lock of another machine may not be seen here
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go with the handle
            return True
    except OSError:
        return False


def _tail(file: Path) -> bytes:
    """Return the last lines of a file; empty if it cannot be read."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return handle.read()
    except OSError:
        return b""


def remove_kept_file(path: Path, *, run_dir: Path) -> None:
    """Remove the copy that `keep_file` has made, once it is sent; another file is left alone."""
    if path.is_relative_to(spool_folder(run_dir) / "files"):
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()


@contextmanager
def sole_sender(run_dir: Path) -> Iterator[bool]:
    """Yield whether no other process sends this spool now; hold its lock meanwhile.

    Where the file system has no locks, the positions on the server keep two senders from doubling what they send.
    """
    handle = None
    is_sole = True
    try:
        handle = os.open(spool_folder(run_dir) / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_sole = False
    except OSError:
        pass
    try:
        yield is_sole
    finally:
        if handle is not None:
            os.close(handle)
