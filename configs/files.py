"""Files that are there whole or not at all, and a folder that one writer holds at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, mark: str = "") -> Iterator[Path]:
    """Give a dot-temp name to write to; on success the file gets its own name, otherwise nothing stays.

    Args:
        path: The file.
        mark: Part of the dot-temp name, where two writers may come at one moment: they must not share it.
    """
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def one_writer(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a folder's lock; the system lets go of it when the process ends, however it ends.

    Args:
        folder: An existing folder.
        on_wait: Called once where another process holds the lock, before waiting for it.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
