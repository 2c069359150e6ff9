"""Write files atomically, and let one process at a time write to a folder."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, mark: str = "") -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` on success, remove it on failure.

    Args:
        path: The file to write.
        mark: Added to the temporary name if two processes may write the same file, so that they do not share it.
    """
    # in the same folder: a rename is atomic only within one file system
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        yield temporary
        # flush the content first: if the rename reached the disk before it, a power cut would leave an empty file
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def one_writer(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a folder's lock while the block runs. The system releases it when the process ends, even by SIGKILL.

    Args:
        folder: An existing folder.
        on_wait: Called once before waiting for another process that holds the lock.
    """
    # never delete the lock file: two processes could then each lock a different file of that name
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
