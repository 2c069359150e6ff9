"""A disk whose operations are counted, and fail or kill from one on."""

import errno
import os
from collections.abc import Callable
from typing import Any

Fail = Callable[[int, str], None]


class CountedOs:
    """Stands in for `os` in training.checkpoint.disk; `fail(number, name)` is called before each operation."""

    def __init__(self, fail: Fail = lambda number, name: None) -> None:
        self.names: list[str] = []
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if not callable(real):
            return real

        def operation(*arguments: Any, **more: Any) -> Any:
            self.names.append(name)
            self._fail(len(self.names), name)
            return real(*arguments, **more)

        return operation


def once(number: int) -> Fail:
    """Let the numbered operation fail."""
    return lambda seen, name: _fail(seen == number)


def from_then_on(number: int) -> Fail:
    """Let the numbered operation fail, and all after it."""
    return lambda seen, name: _fail(seen >= number)


def _fail(wanted: bool) -> None:
    if wanted:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
