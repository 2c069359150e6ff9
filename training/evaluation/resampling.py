"""How sure a mean loss is: the text's units are drawn again with replacement. Numpy only.

Each measurement of a text draws the same units, so the differences between lengths, and between models, are those of
the same draws: what is easy or hard in a document is in both.

Source: Efron and Tibshirani 1993, chapters 6 and 13; Koehn 2004 for models on the same text.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64, SeedSequence

DRAWS = 200  # enough for a standard error, says chapter 6
SEED = 20220425  # fixed: a result must not change with the run's seed
_FEWEST_DOCUMENTS = 30  # with fewer, the spread of their draws says little
_BLOCKS = 50


@dataclass(frozen=True, eq=False)
class Units:
    """Parts of a text that are drawn as a whole.

    Attributes:
        kind: document or block.
        starts: First token of each, [units]; the first is 0.
        tokens: Tokens of the text.
    """

    kind: str
    starts: npt.NDArray[np.int64]
    tokens: int

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.starts)

    def of(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of the unit of each token, in the same shape."""
        return np.searchsorted(self.starts, tokens, side="right") - 1

    def to_json(self) -> dict[str, int | str]:
        """Return what a report says of the draws."""
        return {"unit": self.kind, "units": self.count, "draws": DRAWS, "seed": SEED}


def units_of(documents: npt.NDArray[np.int64] | None, *, tokens: int) -> Units:
    """Return the units of a text: its documents, or blocks of equal length if it has fewer than 30.

    Args:
        documents: First token of each, [documents]; None if they are not known.
        tokens: Tokens of the text.
    """
    if documents is not None and len(documents) >= _FEWEST_DOCUMENTS:
        return Units("document", documents, tokens)
    return Units("block", np.unique(np.arange(_BLOCKS, dtype=np.int64) * tokens // _BLOCKS), tokens)


def drawn_losses(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the mean loss of each draw, [DRAWS].

    Args:
        sums: Loss of each unit's scored predictions, [units].
        counts: Number of these predictions, [units].
    """
    units, losses = len(sums), np.empty(DRAWS)
    # Raw bits: numpy guarantees that they stay the same. What the remainder prefers is less than units / 2^64.
    bits = PCG64(SeedSequence(SEED))
    for draw in range(DRAWS):
        times = np.bincount((bits.random_raw(units) % np.uint64(units)).astype(np.int64), minlength=units)
        count = times @ counts
        # Nothing of it is scored where one window is the whole text: then it says no more than the text itself.
        losses[draw] = times @ sums / count if count else sums.sum() / counts.sum()
    return losses


def interval(values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the range of 95 % of the draws."""
    low, high = np.quantile(values, (0.025, 0.975), method="nearest")
    return float(low), float(high)
