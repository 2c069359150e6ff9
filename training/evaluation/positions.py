"""The loss by place in the window, in bins that widen with the place. Numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LossByPosition:
    """The mean loss of predictions by the tokens that they see, which is their place in the window, from 1.

    Attributes:
        positions: Middle of each bin on a logarithmic scale.
        losses: Mean loss of its predictions, in nats.
        last: Largest position of each bin.
        tokens: Its predictions.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    last: tuple[int, ...]
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a report holds it."""
        return {
            "positions": list(self.positions),
            "loss": list(self.losses),
            "last": list(self.last),
            "tokens": list(self.tokens),
        }


def by_position(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> LossByPosition:
    """Return the loss by position.

    Places that only a sliding window's first place scores are left out: a single prediction says nothing.

    Args:
        sums: Loss at each place, [length].
        counts: Predictions at each place, [length].
    """
    counts = np.where(counts >= min(2, counts.max()), counts, 0)
    ends = bin_ends(len(sums))
    starts = np.concatenate(([0], ends[:-1]))
    in_bin = np.add.reduceat(counts, starts)
    loss_in_bin = np.add.reduceat(np.where(counts > 0, sums, 0.0), starts)
    filled = in_bin > 0
    first = [int(np.flatnonzero(counts[start:end])[0]) + start + 1 for start, end in _filled(starts, ends, filled)]
    last = [int(np.flatnonzero(counts[start:end])[-1]) + start + 1 for start, end in _filled(starts, ends, filled)]
    return LossByPosition(
        positions=tuple(round(float(low * high) ** 0.5, 2) for low, high in zip(first, last, strict=True)),
        losses=tuple((loss_in_bin[filled] / in_bin[filled]).tolist()),
        last=tuple(last),
        tokens=tuple(in_bin[filled].tolist()),
    )


def bin_ends(length: int) -> npt.NDArray[np.int64]:
    """Return the last position of each bin, ascending: four equal bins each time that the position doubles.

    So each context that `training.evaluation.context` cuts to is the first position of a bin. The last position has no
    bin of its own.
    """
    starts = {quarter * 2**doubling // 4 for doubling in range(length.bit_length() + 1) for quarter in (4, 5, 6, 7)}
    return np.array([*(start - 1 for start in sorted(starts - {1}) if start < length), length], np.int64)


def _filled(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], filled: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end, is_filled in zip(starts, ends, filled, strict=True) if is_filled]
