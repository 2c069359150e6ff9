"""The prompt to generate from, and how tokens are sampled. Imports no torch, so that wrong values fail at once."""

import math
import re
import secrets
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from configs.errors import InputError
from data_pipeline.reading import BYTE_ORDER_MARK

DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_P = 0.95
SEED_LIMIT = 2**64  # torch's generator takes seeds below it
_DRAWN_SEEDS = 1_000_000  # enough to differ, and short enough to type again


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens that has this probability.
        seed: Seed of the draws.

    Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or more, got {self.temperature}: 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, got {self.top_p}: 1 draws from all tokens")
        if not 0 <= self.seed < SEED_LIMIT:
            raise InputError(f"seed must be from 0 to {SEED_LIMIT - 1}, got {self.seed}: use 1")
        if self.top_p < 1 and self.greedy:
            raise InputError(
                f"top-p {self.top_p} draws, but temperature 0 takes the likeliest token: raise the temperature or drop "
                "top-p"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is drawn."""
        return self.temperature == 0

    def of_prompt(self, number: int) -> "Sampling":
        """Return the sampling of one of several prompts, counted from 0: its own seed lets it be repeated alone."""
        return Sampling(self.temperature, self.top_p, (self.seed + number) % SEED_LIMIT)


def choose_sampling(
    *, temperature: float | None = None, top_p: float | None = None, seed: int | None = None
) -> Sampling:
    """Return how to sample, with a default for each value that is None.

    The defaults are temperature 0.8, top-p 0.95 and a random seed. With temperature 0, top-p is 1.

    Raises:
        InputError: a value is not a number or out of range, or top-p is given with temperature 0.
    """
    temperature = DEFAULT_TEMPERATURE if temperature is None else _number(temperature, name="temperature")
    if top_p is None:
        top_p = DEFAULT_TOP_P if temperature else 1.0
    drawn = secrets.randbelow(_DRAWN_SEEDS) if seed is None else require_whole_number(seed, name="seed")
    return Sampling(temperature, _number(top_p, name="top-p"), drawn)


def require_whole_number(value: object, *, name: str) -> int:
    """Return a whole number of Python or numpy as an int.

    Raises:
        InputError: it is not a whole number; the message calls it by `name`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number, got {value!r}: give an int")
    return int(value)


def _number(value: object, *, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, got {value!r}: give an int or a float")
    try:
        return float(value)
    except OverflowError:  # an int above all floats
        return math.inf


def read_prompt(text: str | None, file: Path | None) -> str:
    r"""Return the prompt, from text or a file, as training reads text: verbatim, but for a byte order mark before it.

    Args:
        text: The prompt itself; None if it is in a file.
        file: A file, or `-` for standard input; its last line break, \n or \r\n, is dropped.
    Raises:
        InputError: both are given or neither, the file cannot be read, or the prompt is not UTF-8.
    """
    if (text is None) == (file is None):
        given = "neither: give one, or --interactive" if text is None else "both: give one of them"
        raise InputError(f"--prompt TEXT or --prompt-file FILE must be given, got {given}")
    if file is None:
        assert text is not None
        return require_utf8(text.removeprefix(BYTE_ORDER_MARK), name="--prompt")
    name = "standard input" if file == Path("-") else str(file)
    try:
        raw = _read_standard_input() if file == Path("-") else file.read_bytes()
        return re.sub(r"\r?\n\Z", "", raw.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except OSError as error:
        raise InputError(f"--prompt-file {name} cannot be read ({error.strerror}): give a text file, or -") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name} is not UTF-8 at byte {error.start}: write it in UTF-8") from None


def require_utf8(text: object, *, name: str) -> str:
    """Return a text that UTF-8 can hold; the bytes of an argument that was not UTF-8 are halves of surrogate pairs.

    Raises:
        InputError: UTF-8 cannot hold it, or it is not text; the message calls it by `name`.
    """
    if not isinstance(text, str):
        advice = "decode its bytes, as in text.decode()" if isinstance(text, bytes) else "give a str"
        raise InputError(f"{name} must be text, got {type(text).__name__}: {advice}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not UTF-8 at character {error.start}: write it in UTF-8") from None
    return text


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise OSError(None, "it is closed")
    return sys.stdin.buffer.read()
