"""Handle the signals that ask to stop, for a while."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals_handled(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Give SIGINT, SIGTERM and SIGHUP to a function; they end nothing here.

    Args:
        handle: A signal's handler.
    """
    # nohup makes this process ignore SIGHUP, a shell's background job SIGINT: keep them ignored
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
