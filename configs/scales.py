"""`--scale`: positions scaled for texts longer than in training. Imports no torch.

ALiBi has a slope per head, and rotary positions a rate per pair of dimensions: what a token of distance adds to a
penalty or to an angle. Both fall in a geometric sequence. A method divides each of these rates by something between 1
and a factor, which is given or is the length in training lengths. Nothing is trained, and no weight changes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.errors import InputError

LARGEST_FACTOR = 1_000_000.0
# of YaRN: rates that turn more often than the first within a training sequence stay, below the second they are divided
_FAST_TURNS, _SLOW_TURNS = 32, 1


@dataclass(frozen=True)
class Scaling:
    """Positions scaled by a factor.

    Attributes:
        method: One of `SCALES`.
        factor: What it divides by, 1 or more.
        train_length: Tokens of a training sequence.
    """

    method: str
    factor: float
    train_length: int

    def rates(self, rates: Sequence[float]) -> list[float]:
        """Return scaled slopes of heads, or rates of pairs of dimensions."""
        return SCALES[self.method].rates(rates, self)

    @property
    def gain(self) -> float:
        """What rotated queries and keys are multiplied by, each."""
        return SCALES[self.method].gain(self.factor)


@dataclass(frozen=True)
class PositionScale:
    """What `--scale` asks for.

    Attributes:
        method: One of `SCALES`.
        factor: The factor; None if it follows the length.
    """

    method: str
    factor: float | None

    def __str__(self) -> str:
        return self.method if self.factor is None else f"{self.method}:{self.factor!r}".removesuffix(".0")

    def at(self, length: int, *, train_length: int) -> Scaling:
        """Return the scaling for texts of a length.

        Args:
            length: Tokens. A factor that follows it is 1 up to the training length.
            train_length: Tokens of a training sequence.
        """
        factor = max(1.0, length / train_length) if self.factor is None else self.factor
        return Scaling(self.method, factor, train_length)


def scaled_rates(rates: Sequence[float], scaling: Scaling | None) -> list[float]:
    """Return slopes or rates, scaled if there is a scaling."""
    return [*rates] if scaling is None else scaling.rates(rates)


def parse_scale(text: str) -> PositionScale:
    """Parse `linear`, or with a factor `linear:4`.

    Raises:
        InputError: the method is unknown, or the factor is not a number from 1 up.
    """
    method, colon, number = text.partition(":")
    if method not in SCALES:
        raise InputError(
            f"scale {text!r} is not known: use {' or '.join(SCALES)}, with a factor as in linear:4 or without"
        )
    if not colon:
        return PositionScale(method, None)
    factor = float(number) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", number, re.ASCII) else 0.0
    if not 1 <= factor <= LARGEST_FACTOR:
        raise InputError(f"scale {text!r} must have a factor from 1 to {LARGEST_FACTOR:,.0f}: use {method}:4")
    return PositionScale(method, factor)


def _linear(rates: Sequence[float], scaling: Scaling) -> list[float]:
    """Divide all by the factor, which puts positions between the trained ones.

    Source: Chen et al. 2023, arXiv 2306.15595 (rotary); Al-Khateeb et al. 2023, arXiv 2310.13017 (ALiBi).
    """
    return [rate / scaling.factor for rate in rates]


def _ntk(rates: Sequence[float], scaling: Scaling) -> list[float]:
    """Divide the largest by 1, the smallest by the factor, the others by a power of it that follows their logarithm.

    For rotary positions this changes the base to base * factor^(d / (d - 2)). For ALiBi with a power of two of heads,
    head h of H has its slope divided by factor^((h - 1) / (H - 1)).

    Source: bloc97's "NTK-aware scaled RoPE" as in Peng et al. 2023, arXiv 2309.00071, section 3.1;
    github.com/keezen/ntk_alibi, which leaves other numbers of heads open.
    """
    largest, smallest = max(rates), min(rates)
    span = math.log(largest / smallest)
    return [rate / scaling.factor ** (math.log(largest / rate) / span) for rate in rates]


def _yarn(rates: Sequence[float], scaling: Scaling) -> list[float]:
    """Divide rates that turn at most once in a training sequence, keep those that turn often, mix in between.

    Source: Peng et al. 2023, arXiv 2309.00071, section 3.2, with bounds rounded to whole pairs as its code does.
    """
    step = math.log(rates[0] / rates[-1]) / (len(rates) - 1)

    def pair_that_turns(times: int) -> float:
        return math.log(rates[0] * scaling.train_length / (2 * math.pi * times)) / step

    first = max(math.floor(pair_that_turns(_FAST_TURNS)), 0)
    last = min(math.ceil(pair_that_turns(_SLOW_TURNS)), 2 * len(rates) - 1)
    shares = [min(1.0, max(0.0, (pair - first) / max(last - first, 1e-3))) for pair in range(len(rates))]
    return [rate * (1 - share) + rate / scaling.factor * share for rate, share in zip(rates, shares, strict=True)]


def _no_gain(_: float) -> float:
    return 1.0


def _yarn_gain(factor: float) -> float:
    """Return the square root of the inverse temperature; source: Peng et al. 2023, section 3.4."""
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True)
class ScaleMethod:
    """One way to scale positions.

    Attributes:
        rates: Returns scaled slopes or rates.
        gain: What a factor multiplies rotated queries and keys by, each.
        spreads: Whether it scales each rate by another amount, which needs at least two.
    """

    rates: Callable[[Sequence[float], Scaling], list[float]]
    gain: Callable[[float], float] = _no_gain
    spreads: bool = True


SCALES = {
    "linear": ScaleMethod(_linear, spreads=False),
    "ntk": ScaleMethod(_ntk),
    "yarn": ScaleMethod(_yarn, gain=_yarn_gain),
}
