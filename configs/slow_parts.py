"""Say how long a part of a start took, if it was slow. Imports no torch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.figures import duration

SLOW_SECONDS = 1.0


@contextmanager
def timed(done: str, *, say: Callable[[str, str, str], None]) -> Iterator[None]:
    """Time the block; if it took more than a second, say what was done, and in what time.

    Args:
        done: A verb in the past and its object: `drew 9,744 initial weights`.
        say: `info` or `debug` of the caller's logger.
    """
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds > SLOW_SECONDS:
        say("%s in %s", done, duration(seconds))
