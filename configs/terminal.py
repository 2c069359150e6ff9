"""Show text on a terminal as it is: no markup, no emoji codes, and nothing that controls the terminal."""

import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

# Control characters, line and paragraph separators, and halves of surrogate pairs: bytes of a name that is not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text for one line of a message; what would break or steer the line is escaped: \n, \x1b, \udcff."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def status_console(*, quiet: bool = False) -> "Console":
    """Return a console on standard error for progress and notes; writes that fail are dropped.

    Args:
        quiet: Whether to show nothing.
    """
    from rich.console import Console  # here: every command imports this module, and few show progress

    file = cast("TextIO", _BestEffort(sys.stderr))
    return Console(file=file, quiet=quiet, highlight=False, markup=False, emoji=False)


class _BestEffort:
    """A stream whose failed writes are dropped: a full disk or a closed pipe must not end long work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
