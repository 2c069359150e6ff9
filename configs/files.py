"""Write files atomically, and let one process at a time write to a folder."""

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any


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


def write_json(path: Path, value: Mapping[str, Any], *, mark: str = "") -> None:
    """Write a JSON object as `whole_file` does."""
    with whole_file(path, mark=mark) as temporary:
        # ASCII: a file name that is not UTF-8 has no other form in JSON
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def write_whole(path: Path, text: str) -> None:
    """Write a text file as `whole_file` does; two processes may write it at a time."""
    with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
        temporary.write_text(text, encoding="utf-8")


def move_aside(path: Path, *, date: str) -> Path:
    """Rename a file that another of its name is to replace; return its new path.

    Args:
        path: The file.
        date: When it is replaced, in ISO 8601.
    """
    aside = path.with_name(f"{path.stem}.until-{date.replace(':', '')}{path.suffix}")
    path.replace(aside)
    return aside


def try_folder(folder: Path) -> None:
    """Make a folder and write a file in it as `whole_file` does, then undo both: long work must not fail at its end.

    Raises:
        OSError: what writing there would fail with.
    """
    trial, made = folder / f".trial-{secrets.token_hex(4)}", missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(trial) as temporary:
            temporary.touch()
        trial.unlink()
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)
        remove_folders(made)


def missing_folders(folder: Path) -> list[Path]:
    """Return a folder and those above it that do not exist, the deepest first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_folders(folders: list[Path]) -> None:
    """Remove folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


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


def try_to_lock(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of a folder itself while the block runs, if its file system has such locks; leaves no file.

    Args:
        folder: It is made if it does not exist; where it cannot be locked, the block runs without the lock.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return _holding(folder, fcntl.LOCK_EX)


def in_use(folder: Path) -> AbstractContextManager[None]:
    """Show that this process uses a folder while the block runs, as others may too; where it cannot, do nothing."""
    return _holding(folder, fcntl.LOCK_SH)


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine uses a folder, or holds its lock."""
    try:
        with ExitStack() as stack:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextmanager
def _holding(folder: Path, kind: int) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, kind)
        yield
