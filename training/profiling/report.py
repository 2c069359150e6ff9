"""The report of a profile: times by category, the longest operations, rates and memory. Imports no torch."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.profiling.categories import CATEGORIES, MATRIX
from training.profiling.timeline import Interval, TimeSlice

PROFILE_NAME, TRACE_NAME = "profile.json", "trace.json.gz"
SHOWN_OPERATIONS = 12


@dataclass(frozen=True)
class ProfiledOperation:
    """An operation of the profile; a GPU's are kernels.

    Attributes:
        name: torch's, with the shapes of a matrix product.
        category: One of those of `categories.py`.
        calls: Per step.
        milliseconds: Per step.
    """

    name: str
    category: str
    calls: float
    milliseconds: float


def category_times(parts: Iterable[TimeSlice], *, steps: int) -> dict[str, float]:
    """Return the milliseconds per step of each category, in a fixed order; what did not occur is left out."""
    sums: dict[str, int] = defaultdict(int)
    for part in parts:
        sums[part.category] += part.nanoseconds
    return {name: sums[name] / steps / 1e6 for name in CATEGORIES if sums[name]}


def longest_operations(parts: Iterable[TimeSlice], *, steps: int) -> list[ProfiledOperation]:
    """Return the operations that take longest, the longest first."""
    times: dict[tuple[str, str], int] = defaultdict(int)
    calls: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for part in parts:
        if part.interval is not None:
            key = (_title(part.interval), part.category)
            times[key] += part.nanoseconds
            calls[key].add((part.interval.began, part.interval.identity))
    longest = sorted(times, key=lambda key: -times[key])[:SHOWN_OPERATIONS]
    return [ProfiledOperation(*key, len(calls[key]) / steps, times[key] / steps / 1e6) for key in longest]


def product_flops(operations: Iterable[Interval]) -> int:
    """Return the FLOPs of the matrix products among operations, two for each multiplication and addition.

    Batched products are left out: they are attention's, and so is their time.
    """
    return sum(2 * math.prod(factors) for factors in map(_factors, operations) if factors)


def _title(interval: Interval) -> str:
    factors = _factors(interval)
    return f"{interval.name} {factors[0]} x {factors[1]} x {factors[2]}" if factors else interval.name


def _factors(interval: Interval) -> tuple[int, int, int] | None:
    """Return rows, inner and columns of a matrix product; None of another operation."""
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(interval.name)
    if first is None or len(interval.shapes) < first + 2:
        return None
    left, right = interval.shapes[first : first + 2]
    return (left[0], left[1], right[1]) if len(left) == len(right) == 2 else None


def profile_document(
    *,
    facts: dict[str, Any],
    parts: Sequence[TimeSlice],
    operations: Sequence[Interval],
    steps: int,
    gemm_flops_per_second: float,
) -> dict[str, Any]:
    """Return profile.json as plain values.

    Args:
        facts: What is known of the run and its speed; first in the document.
        parts: The whole window.
        operations: Operations in it, for their FLOPs.
        steps: Steps in it.
        gemm_flops_per_second: Rate of one large matrix product on this device.
    """
    times = category_times(parts, steps=steps)
    whole = sum(times.values())
    seconds = times.get(MATRIX, 0.0) * steps / 1000
    rate = product_flops(operations) / seconds if seconds else None
    return {
        **facts,
        "profiled_steps": steps,
        "profiled_step_milliseconds": whole,
        "categories": [{"name": name, "milliseconds": value, "share": value / whole} for name, value in times.items()],
        "matrix_products": {
            "flops_per_second": rate,
            "gemm_flops_per_second": gemm_flops_per_second,
            "share_of_gemm": rate / gemm_flops_per_second if rate else None,
        },
        "operations": [asdict(each) for each in longest_operations(parts, steps=steps)],
    }
