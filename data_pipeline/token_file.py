"""Tokens on disk, read as one array: a text may be larger than memory."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from configs.errors import MachineError
from data_pipeline.indexed import smallest_dtype


class TokenFile:
    """Collects tokens in a file without a name, in the folder of temporary files: a context manager.

    The file disappears once it is closed and no array from `read` is left.

    Attributes:
        count: Tokens so far.
    """

    def __init__(self, *, vocab_size: int) -> None:
        """Open the file.

        Args:
            vocab_size: All tokens are below it.
        Raises:
            MachineError: no file can be made.
        """
        self._dtype, self.count = smallest_dtype(vocab_size), 0
        try:
            self._file = tempfile.TemporaryFile()
        except OSError as error:
            raise _not_written(error) from None

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a full disk, which has been reported
            self._file.close()

    def add(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Add tokens, [tokens].

        Raises:
            MachineError: they cannot be written.
        """
        try:
            self._file.write(np.asarray(tokens, self._dtype).tobytes())
        except OSError as error:
            raise _not_written(error) from None
        self.count += len(tokens)

    def read(self) -> NDArray[np.integer]:
        """Return all tokens, [tokens], in the smallest type that Megatron has for them: a view of the file.

        Raises:
            MachineError: they cannot be written.
        """
        if not self.count:  # numpy cannot map an empty file
            return np.zeros(0, self._dtype)
        try:
            self._file.flush()
        except OSError as error:
            raise _not_written(error) from None
        return np.memmap(self._file, self._dtype, "r")


def _not_written(error: OSError) -> MachineError:
    folder = tempfile.tempdir or "a temporary folder"
    return MachineError(
        f"the tokens of a text cannot be written to {folder} ({error.strerror}): free space there, or set TMPDIR to "
        "another folder"
    )
