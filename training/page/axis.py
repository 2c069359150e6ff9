"""Axes of the page's charts: where a value lies, which ticks to draw, how a value is written. Imports no torch."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from configs.figures import byte_size, scaled, told_apart

Unit = Literal["plain", "count", "share", "gigabytes"]
"""How values of an axis are written; page.js knows the same names."""

_LOGARITHMIC_RATIO = 6.0  # an axis that may be logarithmic is so from this ratio of its ends
_LEAST_SCALED, _LEAST_PLAIN = 1e5, 1e-2  # between them a number is written with all its digits
_TRAILING_ZEROS = re.compile(r"\.0+(?=\D)|(\.\d*[1-9])0+(?=\D)")
_EXPONENT = re.compile(r"e\+?(-?)0?")  # 2e-04 is 2e-4
_SMALLEST, _LARGEST = 1e-100, 1e100  # what is smaller counts as 0; no product of others overflows
_MOST_TICKS = 6  # of an axis that is not logarithmic
_MANY_DECADES = 3.0  # from here on, only powers of ten get a tick


@dataclass(frozen=True)
class ChartAxis:
    """One axis of a chart.

    Attributes:
        low, high: Its ends, low < high.
        logarithmic: Whether equal ratios, not differences, have equal lengths; then low > 0.
        unit: How its values are written.
        ticks: Values to mark.
    """

    low: float
    high: float
    logarithmic: bool
    unit: Unit
    ticks: tuple[float, ...]

    def tick_texts(self) -> list[str]:
        """Return the ticks as texts, which differ."""
        return told_apart(self.ticks, lambda value, digits: write_value(value, unit=self.unit, digits=digits))

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high one, outside of both for others."""
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return -1.0
        return math.log(value / self.low) / math.log(self.high / self.low)


def fit_axis(
    values: Iterable[float],
    *,
    unit: Unit = "plain",
    from_zero: bool = False,
    may_be_logarithmic: bool = False,
    pad: bool = True,
) -> ChartAxis:
    """Return an axis that shows all values, at least one.

    Args:
        values: Finite values.
        unit: How they are written.
        from_zero: Whether the axis begins at 0.
        may_be_logarithmic: Whether it is logarithmic where the values span much.
        pad: Whether to leave room beyond the smallest and the largest value, much where they are nearly equal.
    """
    known = [*values]
    low, high = _within_range(min(known)), _within_range(max(known))
    if may_be_logarithmic and low > 0 and high / low >= _LOGARITHMIC_RATIO:
        ratio = (high / low) ** 0.04 if pad else 1.0
        low, high = low / ratio, high * ratio
        return ChartAxis(low, high, True, unit, logarithmic_ticks(low, high))
    low = min(0.0, low) if from_zero else low
    margin = high - low
    if pad or not margin:  # at least a hundredth of the value, so that rounding does not look like a cliff
        margin = max(margin, 0.01 * max(abs(high), abs(low))) or 1.0
    if high - low < margin:
        low, high = (low if from_zero else low - margin / 2), high + margin / 2
    if pad:
        low, high = (low if from_zero else low - 0.05 * margin), high + 0.06 * margin
    ticks = linear_ticks(low, high)
    # there are no halves of a step
    return ChartAxis(low, high, False, unit, tuple(tick for tick in ticks if unit != "count" or tick.is_integer()))


def lengths_axis(lengths: Iterable[int], *, keep: Iterable[int] = ()) -> ChartAxis:
    """Return a logarithmic axis with a tick at each length that has room for its text; those to keep come first."""
    shown = sorted({*lengths, *keep})
    low, high = shown[0] / 2**0.3, shown[-1] * 2**0.3
    least = (high / low) ** (1 / 8)  # there is room for about eight
    ticks: list[int] = []
    for length in (*sorted(keep), *shown):
        if all(max(length, other) / min(length, other) >= least for other in ticks):
            ticks.append(length)
    return ChartAxis(low, high, True, "count", tuple(sorted(ticks)))


def linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return at most six round values between two ends: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))


def logarithmic_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return powers of ten between two ends, and 2 and 5 times them where few decades are shown."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if math.log10(high / low) > _MANY_DECADES else (1, 2, 5)
    every = math.ceil((last - first) / 8)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return tuple(tick for tick in ticks if low <= tick <= high)


def write_value(value: float, *, unit: Unit, digits: int = 3) -> str:
    """Return a value as text of about so many digits, in few characters."""
    match unit:
        case "count":
            return f"{value:,.0f}" if abs(value) < _LEAST_SCALED else _TRAILING_ZEROS.sub(r"\1", scaled(value, digits))
        case "share":
            return f"{100 * value:.{digits}g} %"
        case "gigabytes":
            return _TRAILING_ZEROS.sub(r"\1", byte_size(1e9 * value, digits))
        case "plain":
            if 1000 <= abs(value) < _LEAST_SCALED:
                return f"{value:,.0f}"
            is_common = value == 0 or _LEAST_PLAIN <= abs(value) < 1000
            if is_common:
                return f"{value:.{digits + 1}g}"
            return _EXPONENT.sub(r"e\1", _TRAILING_ZEROS.sub(r"\1", f"{value:.{digits - 2}e}"))


def _within_range(value: float) -> float:
    return 0.0 if abs(value) < _SMALLEST else min(max(value, -_LARGEST), _LARGEST)
