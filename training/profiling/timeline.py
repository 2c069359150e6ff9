"""What each moment of a profiled window was spent on: on a CPU by the operation that ran, on a GPU by its kernels.

Imports no torch. The parts add up to the window exactly: on a GPU, time in which kernels overlap counts once.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from training.profiling.categories import (
    COMMUNICATION,
    HOST,
    IDLE,
    category_of_kernel,
    category_of_operation,
)

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Interval:
    """A stretch of time that a profiler recorded; nanoseconds of one clock.

    Attributes:
        name: Name of the operation or kernel.
        began, ended: Its time.
        thread: Thread of an operation.
        identity: Number of the operation; for a kernel, of the operation that launched it.
        shapes: Shapes of an operation's inputs; empty for one that is not a tensor.
    """

    name: str
    began: int
    ended: int
    thread: int = 0
    identity: int = 0
    shapes: Shapes = ()


@dataclass(frozen=True)
class TimeSlice:
    """A piece of the window, and what it was spent on.

    Attributes:
        category: One of those of `categories.py`.
        interval: The operation or kernel; None for time in which there was none.
        nanoseconds: Its length.
    """

    category: str
    interval: Interval | None
    nanoseconds: int


def parts_of_cpu(operations: Iterable[Interval], *, window: Interval, transfers: Sequence[Interval]) -> list[TimeSlice]:
    """Return the parts of the window by what a CPU rank's thread did.

    Args:
        operations: Operations of the window's thread, the window itself left out.
        window: What was profiled.
        transfers: What the collectives' own threads did: the rank waits for it where it does nothing else.
    """
    busy = _union(transfers)
    parts = []
    for began, ended, stack in _innermost(operations, window=window):
        path = [operation.name for operation in stack]
        category = category_of_operation(path)
        shared = _overlap(began, ended, busy) if category == HOST else 0
        last = stack[-1] if stack else None
        parts.append(TimeSlice(category, last, ended - began - shared))
        if shared:
            parts.append(TimeSlice(COMMUNICATION, Interval("waiting for other ranks", began, ended), shared))
    return parts


def parts_of_gpu(kernels: Iterable[Interval], *, window: Interval, paths: dict[int, list[str]]) -> list[TimeSlice]:
    """Return what a GPU did in the window; where kernels overlap, communication counts only if it runs alone.

    Args:
        kernels: What ran on the GPU.
        window: What was profiled; the GPU's queue is empty at both ends.
        paths: Names around the operation that launched a kernel, from the outermost to its own, by identity.
    """
    known = [(kernel, category_of_kernel(kernel.name, paths.get(kernel.identity, []))) for kernel in kernels]
    order = sorted(range(len(known)), key=lambda index: known[index][0].began)
    active: list[tuple[bool, int, int]] = []  # (is communication, end, index): the first is what counts
    parts, now = [], window.began
    starts = [*(max(known[index][0].began, window.began) for index in order), window.ended]
    for position, start in enumerate(starts):
        while now < start:  # nothing begins before `start`
            while active and active[0][1] <= now:
                heapq.heappop(active)
            until = min(start, active[0][1]) if active else start
            kernel, category = known[active[0][2]] if active else (None, IDLE)
            parts.append(TimeSlice(category, kernel, until - now))
            now = until
        if position < len(order):
            kernel, category = known[order[position]]
            heapq.heappush(active, (category == COMMUNICATION, min(kernel.ended, window.ended), order[position]))
    return parts


def names_around(operations: Iterable[Interval]) -> dict[int, list[str]]:
    """Return each operation's name after those of the operations around it on its thread, by identity."""
    paths: dict[int, list[str]] = {}
    stacks: dict[int, list[Interval]] = {}
    for operation in sorted(operations, key=_by_start):
        stack = stacks.setdefault(operation.thread, [])
        while stack and stack[-1].ended <= operation.began:
            stack.pop()
        stack.append(operation)
        paths[operation.identity] = [outer.name for outer in stack]
    return paths


def _by_start(interval: Interval) -> tuple[int, int]:
    return interval.began, -interval.ended


def _innermost(operations: Iterable[Interval], *, window: Interval) -> Iterator[tuple[int, int, list[Interval]]]:
    """Yield the window in pieces, each with the operations that ran in it from the outermost to the innermost."""
    stack: list[Interval] = []
    now = window.began
    for operation in sorted(operations, key=_by_start):
        if operation.began < window.began or operation.ended > window.ended:
            continue
        while stack and stack[-1].ended <= operation.began:
            if stack[-1].ended > now:
                yield now, stack[-1].ended, list(stack)
                now = stack[-1].ended
            stack.pop()
        if operation.began > now:
            yield now, operation.began, list(stack)
            now = operation.began
        stack.append(operation)
    while stack:
        if stack[-1].ended > now:
            yield now, stack[-1].ended, list(stack)
            now = stack[-1].ended
        stack.pop()
    if window.ended > now:
        yield now, window.ended, []


def _union(intervals: Iterable[Interval]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for interval in sorted(intervals, key=_by_start):
        if joined and interval.began <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], interval.ended))
        else:
            joined.append((interval.began, interval.ended))
    return joined


def _overlap(began: int, ended: int, intervals: Iterable[tuple[int, int]]) -> int:
    return sum(max(0, min(ended, stop) - max(began, start)) for start, stop in intervals)
