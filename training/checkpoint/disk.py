"""The file operations of a save. No torch.

Each one goes through `os` here or in configs/files.py, so that tests can make it fail.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs.files import sync_folder

Bytes = bytes | memoryview


@dataclass(frozen=True)
class FileEntry:
    """One file: size in bytes and SHA-256."""

    bytes: int
    sha256: str


class NewFile:
    """A file that a thread hashes while it is written; `finish` flushes it to disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # O_EXCL: never write into a file that is already there
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest, self._bytes = hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._hashed: Future[None] | None = None

    def write(self, data: Bytes) -> None:
        """Append bytes. They must not change before the next call: the thread may still be hashing them."""
        assert self._handle is not None, f"{self._path} is finished"
        self._wait_for_hash()
        left = memoryview(data)
        self._hashed = self._hasher.submit(self._digest.update, left)
        self._bytes += len(left)
        while left:  # a write may take fewer bytes than it is given
            left = left[os.write(self._handle, left) :]

    def finish(self) -> FileEntry:
        """Flush the file to disk; return its size and hash."""
        assert self._handle is not None, f"{self._path} is finished"
        os.fsync(self._handle)
        self._wait_for_hash()
        self.close()
        return FileEntry(self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file, whole or not; closing it again does nothing."""
        # Forget the handle first: a failed close frees the descriptor too, and it must not be closed twice.
        handle, self._handle = self._handle, None
        self._hasher.shutdown()
        if handle is not None:
            os.close(handle)

    def _wait_for_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()


def write_file(path: Path, parts: Iterable[Bytes]) -> FileEntry:
    """Write a whole new file and flush it to disk."""
    file = NewFile(path)
    try:
        for part in parts:
            file.write(part)
        return file.finish()
    finally:
        file.close()


def make_folder(folder: Path) -> None:
    """Make a new folder, and its parent if that does not exist."""
    if not folder.parent.is_dir():
        os.mkdir(folder.parent)
        # without this a power cut could remove the parent with every checkpoint saved in it
        sync_folder(folder.parent.parent)
    os.mkdir(folder)


def rename(path: Path, new: Path) -> None:
    """Rename a folder. Atomic, but a power cut may undo it until the parent is flushed."""
    os.rename(path, new)


def remove(folder: Path) -> None:
    """Remove a folder and its contents. A link is removed, not followed; a file in its place is removed too."""
    if folder.is_symlink() or not folder.is_dir():
        os.unlink(folder)
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            remove(Path(entry.path))
        else:
            os.unlink(entry.path)
    os.rmdir(folder)


def describe_file(path: Path) -> FileEntry:
    """Read a whole file; return its size and hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(file.tell(), digest)
