"""Figures as a person reads them: times, counts, sizes. Each has about three digits, and one form everywhere."""

from collections.abc import Callable, Sequence
from math import isqrt

JOULES_PER_KWH = 3.6e6
_LARGEST_DIVIDED = 10**12
_MOST_DIGITS = 12


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 2.3 s, 38 s, 2m05s, 1h23m, 4d05h."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60}m{round(seconds) % 60:02}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


def scaled(number: float, digits: int = 3) -> str:
    """Return a count with a letter for its thousands: 999, 36.7k, 1.23M, 1.36B, 1.40T."""
    return "".join(_in_thousands(number, ("", "k", "M", "B", "T"), digits))


def byte_size(number: float, digits: int = 3) -> str:
    """Return a number of bytes: 512 B, 340 MB, 1.23 GB; of 10^3, 10^6, 10^9 bytes."""
    return " ".join(_in_thousands(number, ("B", "kB", "MB", "GB", "TB"), digits))


def told_apart(values: Sequence[float], write: Callable[[float, int], str]) -> list[str]:
    """Return values, as those of an axis, as texts of three digits, or of as many as tell them apart.

    Args:
        values: Finite values.
        write: Returns a value as a text of some digits.
    """
    for digits in range(3, _MOST_DIGITS):
        texts = [write(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [write(value, _MOST_DIGITS) for value in values]


def energy(joules: float) -> str:
    """Return an energy: 320 J, 0.0123 kWh, 4.56 kWh, 1.2 MWh."""
    kwh = joules / JOULES_PER_KWH
    if kwh < 1e-3:
        return f"{joules:.3g} J"
    return f"{kwh:.3g} kWh" if kwh < 999.5 else f"{kwh / 1000:,.3g} MWh"


def counted(number: int, noun: str) -> str:
    """Return a number of things: 1 step, 1,200 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def perplexity_text(value: float) -> str:
    """Return a perplexity with two decimals, as they are compared; a large one without: 72.07, 2,317, 3.2e+06."""
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _in_thousands(number: float, units: tuple[str, ...], digits: int) -> tuple[str, str]:
    first, *larger = units
    if number < 999.5:
        return f"{number:.{digits}g}", first
    for unit in larger:
        number /= 1000
        if number < 999.5:
            return f"{number:#.{digits}g}".rstrip("."), unit
    return f"{number:,.0f}", units[-1]


def divisors(number: int) -> str:
    """Return the divisors of a number in words: `1, 2, 4 or 8`; `a divisor of it` if it is too large to factor."""
    if number > _LARGEST_DIVIDED:
        return "a divisor of it"
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    words = [str(n) for n in sorted({*small, *(number // n for n in small)})]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
