"""What a save does to the disk, each operation through `os` here, so that tests can let each one fail. No torch."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

Bytes = bytes | memoryview


@dataclass(frozen=True)
class FileEntry:
    """One file: size in bytes and SHA-256."""

    bytes: int
    sha256: str


class NewFile:
    """A file that is hashed beside being written, by a thread, and on the disk once it is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest, self._bytes = hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._hashed: Future[None] | None = None

    def write(self, data: Bytes) -> None:
        """Append bytes, which must not change before the next call."""
        assert self._handle is not None, f"{self._path} is finished"
        self._wait_for_hash()
        left = memoryview(data)
        self._hashed = self._hasher.submit(self._digest.update, left)
        self._bytes += len(left)
        while left:
            left = left[os.write(self._handle, left) :]

    def finish(self) -> FileEntry:
        """Wait until the disk has it; return its size and hash."""
        assert self._handle is not None, f"{self._path} is finished"
        os.fsync(self._handle)
        self._wait_for_hash()
        self.close()
        return FileEntry(self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Let go of the file, whole or not."""
        handle, self._handle = self._handle, None
        self._hasher.shutdown()
        if handle is not None:
            os.close(handle)

    def _wait_for_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()


def write_file(path: Path, parts: Iterable[Bytes]) -> FileEntry:
    """Write a whole new file."""
    file = NewFile(path)
    try:
        for part in parts:
            file.write(part)
        return file.finish()
    finally:
        file.close()


def make_folder(folder: Path) -> None:
    """Make a new folder; the one that it lies in may be there."""
    if not folder.parent.is_dir():
        os.mkdir(folder.parent)
        sync_folder(folder.parent.parent)  # else a power cut takes it with every checkpoint in it
    os.mkdir(folder)


def rename(path: Path, new: Path) -> None:
    """Give a folder another name."""
    os.rename(path, new)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it; a link is removed, not followed."""
    if folder.is_symlink():
        os.unlink(folder)
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            remove(Path(entry.path))
        else:
            os.unlink(entry.path)
    os.rmdir(folder)


def describe_file(path: Path) -> FileEntry:
    """Return the size and hash of a file as it is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(file.tell(), digest)
