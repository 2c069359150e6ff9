"""Shares that were measured on few prompts: their intervals, and their means over depths. Arithmetic only."""

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

_Z = 1.959963984540054  # of the normal distribution, for 95 %


def wilson_interval(share: float, *, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of successes; of a mean of shares, which vary less, it is wide enough.

    Args:
        share: The share, from 0 to 1.
        trials: Independent trials, one or more.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    squared = _Z * _Z
    middle = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + squared / (4 * trials * trials)) / (1 + squared / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def over_depths(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a result for each task and length: the mean of its depths, which have equally many prompts."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in report["results"]:
        groups.setdefault((result["task"], result["length"]), []).append(result)
    for (task, length), cells in groups.items():
        prompts = sum(cell["prompts"] for cell in cells)
        mean = {key: fmean(cell[key] for cell in cells) for key in ("recall", "choice", "log_probability", "margin")}
        intervals = {f"{key}_interval": wilson_interval(mean[key], trials=prompts) for key in ("recall", "choice")}
        yield {"task": task, "length": length, "prompts": prompts, **mean, **intervals}


def share_with_interval(result: dict[str, Any], key: str) -> str:
    """Return a share and its interval: 95 % (84-99)."""
    low, high = (f"{100 * bound:.0f}" for bound in result[f"{key}_interval"])
    return f"{100 * result[key]:.0f} % ({low}-{high})"
