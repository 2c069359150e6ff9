"""Follow a file that another process appends to or replaces, reading each line once. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

_LONGEST_LINE = 1 << 20  # most bytes kept of a file without line breaks, such as a hole that a bad disk left


class AppendedLines:
    """Reads the lines that were added since the last time; a last line without its line break waits for the rest.

    Args:
        path: The file, which may not exist yet.
        last_bytes: How much of a long file counts at first; None for all of it.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        self._path, self._last_bytes = path, last_bytes
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset, self._last_line = 0, b""

    def starts_over(self) -> bool:
        """Return whether `read` starts over: the name is another file's now, or the file was truncated.

        Raises:
            OSError: the disk cannot be read.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            file, size = None, 0
        else:
            file, size = (status.st_dev, status.st_ino), status.st_size
        if file == self._file and size >= self._offset and self._ends_in_last_line():
            return False
        self._file, self._last_line = file, b""
        self._offset = 0 if self._last_bytes is None else max(0, size - self._last_bytes)
        return True

    def read(self) -> Iterator[bytes]:
        """Yield the new lines with their line breaks; call `starts_over` before.

        Raises:
            OSError: the file cannot be read.
        """
        if self._file is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while line := file.readline(_LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                    return
                self._offset, self._last_line = self._offset + len(line), line
                yield line

    def _ends_in_last_line(self) -> bool:
        """Return whether the last line read is still there: the second of two replacements may get the old inode."""
        if not self._last_line:
            return True
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._last_line))
            return file.read(len(self._last_line)) == self._last_line
