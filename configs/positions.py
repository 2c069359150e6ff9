"""Position methods: the facts that rules, launcher and the model's description need. Imports no torch.

The implementations are in `training/model/positions/`, a file per method.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from configs.choices import Choice
from configs.errors import InputError
from configs.scales import SCALES, PositionScale, parse_scale

if TYPE_CHECKING:
    from configs.schema import Model

BiasKind = Literal["none", "slopes", "table"]
"""Bias added to the scores besides the causal mask: none, minus a slope per head times the distance, or any other."""


def _no_rule(_: "Model") -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class Position(Choice):
    """One position method; `implementation` is a subclass of `PositionMethod`.

    Attributes:
        title: What it is called in a sentence.
        bias: Kind of bias that it adds to the scores; the attention backend must support it.
        slopes: Slope of each head of a model; None without a bias of slopes.
        entries_per_head: Columns of the learned table, which has a row per head and is shared by all layers; 0 if
            nothing is learned.
        table_std: Std of the table's initial values; None for `model.init_std`.
        added_variance: Mean square of what it adds to the embedding, which it first multiplies by sqrt(hidden).
        rotates: Whether it rotates queries and keys, so that rotated copies may be kept for the backward pass.
        carried: Whether the code that an export can carry has it.
        scales: What `--scale` can do with it, in `configs.scales`.
        problems: Yields a line per requirement that a model breaks: what must hold, the value seen, what to do.
    """

    title: str
    bias: BiasKind = "none"
    slopes: "Callable[[Model], Sequence[float]] | None" = None
    entries_per_head: int = 0
    table_std: float | None = None
    added_variance: float = 0.0
    rotates: bool = False
    carried: bool = False
    scales: tuple[str, ...] = ()
    problems: "Callable[[Model], Iterator[str]]" = _no_rule

    @property
    def has_bias(self) -> bool:
        """Whether it adds a bias to the scores besides the causal mask."""
        return self.bias != "none"


def _even_hidden(model: "Model") -> Iterator[str]:
    if model.hidden % 2:
        yield f"model.hidden must be even for sinusoidal positions, got {model.hidden}: use {model.hidden + 1}"


def _even_heads(model: "Model") -> Iterator[str]:
    if model.hidden % model.heads == 0 and model.head_dim % 2:
        yield f"model.hidden / model.heads must be even for rotary positions, got {model.head_dim}: use fewer heads"


ALIBI_BIAS_MAX = 8
"""The paper's value of `model.alibi_bias_max`, and the only one of BLOOM."""


def slopes(heads: int, *, bias_max: float = ALIBI_BIAS_MAX) -> list[float]:
    """Return the slope of every head of the model.

    For a power of two n, a geometric sequence that begins at its own ratio, 2^(-bias_max/n). For any other number, the
    slopes of the power of two below, then every other slope of the power of two above.
    """
    below = 2 ** int(math.log2(heads))
    first = [2.0 ** (-bias_max * (head + 1) / below) for head in range(below)]
    between = [2.0 ** (-bias_max * (head + 0.5) / below) for head in range(heads - below)]
    return first + between


def _alibi_slopes(model: "Model") -> list[float]:
    return slopes(model.heads, bias_max=model.alibi_bias_max)


T5_BUCKETS = 32

POSITIONS = {
    row.name: row
    for row in (
        Position(
            "alibi",
            "training.model.positions.alibi.Alibi",
            title="ALiBi",
            bias="slopes",
            slopes=_alibi_slopes,
            scales=("linear", "ntk"),
            carried=True,
        ),
        Position(
            "sinusoidal",
            "training.model.positions.sinusoidal.Sinusoidal",
            title="sinusoidal positions",
            added_variance=0.5,  # of sines and cosines
            problems=_even_hidden,
            carried=True,
        ),
        Position(
            "rotary",
            "training.model.positions.rotary.Rotary",
            title="rotary positions",
            rotates=True,
            scales=("linear", "ntk", "yarn"),
            problems=_even_heads,
            carried=True,
        ),
        Position(
            "t5",
            "training.model.positions.t5.T5",
            title="T5 bias",
            bias="table",
            entries_per_head=T5_BUCKETS,
            carried=True,
        ),
        Position(
            "kerple",
            "training.model.positions.kerple.Kerple",
            title="KERPLE bias",
            bias="table",
            entries_per_head=2,
            table_std=0.5,  # of logarithms: heads begin at different rates
        ),
        Position("sandwich", "training.model.positions.sandwich.Sandwich", title="Sandwich bias", bias="table"),
        Position(
            "none", "training.model.positions.method.PositionMethod", title="attention without positions", carried=True
        ),
    )
}


def scale_for(text: str, model: "Model") -> PositionScale:
    """Parse a scale for a model.

    Raises:
        InputError: see `parse_scale`; or the model's positions cannot be scaled so.
    """
    scale, position = parse_scale(text), POSITIONS[model.position]
    if scale.method not in position.scales:
        able = " or ".join(row.name for row in POSITIONS.values() if scale.method in row.scales)
        advice = f"use {' or '.join(position.scales)}" if position.scales else "leave --scale out"
        raise InputError(f"scale {scale.method} is for {able} positions, and this model has {model.position}: {advice}")
    rates = model.heads if position.slopes is not None else model.head_dim // 2
    if rates < 2 and SCALES[scale.method].spreads:
        what = "head" if position.slopes is not None else "pair of dimensions in a head"
        raise InputError(f"scale {scale.method} needs more than one {what}, and this model has one: use linear")
    return scale


def fixed_scale_for(text: str, model: "Model") -> PositionScale:
    """Parse a scale with a factor for a model: a text that grows has no length to follow.

    Raises:
        InputError: see `scale_for`; or it has no factor.
    """
    scale = scale_for(text, model)
    if scale.factor is None:
        raise InputError(
            f"scale {text!r} follows the length, which grows as text is generated: give a factor, as in {text}:4"
        )
    return scale
