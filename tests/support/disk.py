"""Count the file operations of a save; make one fail, or all from one on, or kill the process there."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from configs import files
from training.checkpoint import disk

OnOperation = Callable[[int, str], None]


class _CountingOs:
    """Stands in for a module's `os`: each call of a function is one operation."""

    def __init__(self, operate: Callable[[str], None]) -> None:
        self._operate = operate

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if not callable(real):
            return real

        def operation(*arguments: Any, **more: Any) -> Any:
            self._operate(name)
            return real(*arguments, **more)

        return operation


@contextmanager
def counted_operations(before: OnOperation = lambda number, name: None) -> Iterator[list[str]]:
    """Count the file operations of the saves in the block.

    Args:
        before: Called before each operation with its number, from 1, and its name; may raise.
    Yields:
        The names of the operations, a list that grows.
    """
    names: list[str] = []

    def operate(name: str) -> None:
        names.append(name)
        before(len(names), name)

    def operate_if_saving(name: str) -> None:
        # configs.files writes the files of a start too. A save begins with an operation of training.checkpoint.disk.
        if names:
            operate(name)

    with (
        patch.object(disk, "os", _CountingOs(operate)),
        patch.object(files, "os", _CountingOs(operate_if_saving)),
    ):
        yield names


def once(number: int) -> OnOperation:
    """Make the numbered operation fail."""
    return lambda seen, name: fail_operation(seen == number)


def from_then_on(number: int) -> OnOperation:
    """Make the numbered operation fail, and all after it."""
    return lambda seen, name: fail_operation(seen >= number)


def fail_operation(wanted: bool = True) -> None:
    """Raise the error of a disk that fails."""
    if wanted:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
