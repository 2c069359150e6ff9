"""Slow parts of a start: log how long one took, and import without garbage collection. Imports no torch."""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.figures import duration

SLOW_SECONDS = 1.0


@contextmanager
def timed(done: str, *, say: Callable[[str, str, str], None]) -> Iterator[None]:
    """Time the block; if it took more than a second, log what was done and how long it took.

    Args:
        done: A verb in the past and its object: `drew 9,744 initial weights`.
        say: `info` or `debug` of the caller's logger.
    """
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds > SLOW_SECONDS:
        say("%s in %s", done, duration(seconds))


@contextmanager
def importing() -> Iterator[None]:
    """Import in the block without garbage collection, and leave the new objects out of later collections.

    Libraries make a million objects that stay: looking at them took a second of a start, half of it in collections that
    DeepSpeed asks for while it builds an engine. Where torch is there already, nothing slow is left to import.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
