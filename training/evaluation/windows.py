"""Place windows over a text, and decide which predictions each one scores. Arithmetic only: no tensor, no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.protocols import WindowProtocol

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `length` inputs over a text; no prediction is scored twice.

    Attributes:
        length: Inputs of a window, and so its predictions.
        starts: First input of each window, a place in the text, [windows].
        scored_from, scored_to: The predictions that it scores, counted within the window, [windows] each. Prediction p
            sees p + 1 inputs, and is of the token at start + p + 1.
    """

    length: int
    starts: Numbers
    scored_from: Numbers
    scored_to: Numbers

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.starts)

    @property
    def scored(self) -> int:
        """Number of predictions that all windows score."""
        return int((self.scored_to - self.scored_from).sum())

    @property
    def inputs(self) -> int:
        """Inputs of all windows: a measure of the work."""
        return self.count * self.length

    def batches(self, *, most: int, first: int = 0) -> Iterator[slice]:
        """Yield the windows in batches, those from `first` on.

        A window that scores more than the next one begins a batch of its own: the model computes losses for all of a
        batch from the first one that is scored on.

        Args:
            most: Windows of a batch, at most.
            first: Windows that are left out.
        """
        while first < self.count:
            last = min(first + most, self.count)
            if first + 1 < last and self.scored_from[first] < self.scored_from[first + 1]:
                last = first + 1
            yield slice(first, last)
            first = last

    def scored_at(self) -> Numbers:
        """Return how many windows score each of their predictions, [length]."""
        steps = np.zeros(self.length + 1, np.int64)
        np.add.at(steps, self.scored_from, 1)
        np.add.at(steps, self.scored_to, -1)
        counts: Numbers = steps.cumsum()[:-1]
        return counts

    def scored_in(self, starts: Numbers) -> Numbers:
        """Return how many tokens are scored in each part of a text, [parts].

        Args:
            starts: First token of each part, ascending; the last part goes to the end of the text.
        """
        first, scored = self.starts + self.scored_from + 1, self.scored_to - self.scored_from
        before = np.concatenate(([0], scored.cumsum()))
        # the last window that scores a token before the part, as windows score tokens in their order; none is -1
        window = np.searchsorted(first, starts, side="right") - 1
        reached = before[window + 1] - np.maximum(0, first[window] + scored[window] - starts)
        return np.diff(np.where(window < 0, 0, reached), append=before[-1])


@dataclass(frozen=True)
class SameTokens:
    """The tokens that each measurement of a sweep scores.

    Attributes:
        span: Predictions that every length scores where windows move over the whole text: tokens 1 to `span`.
        longest: The longest length: where each window scores only its last predictions, the windows of every length
            end where those of the longest do.
    """

    span: int
    longest: int


def require_fit(protocol: WindowProtocol, *, length: int) -> None:
    """Refuse a protocol whose window would move by, or score, more than its length.

    Raises:
        InputError: it would.
    """
    if protocol.scored is None or protocol.scored <= length:
        return
    if protocol.stride is not None:
        raise InputError(
            f"protocol {protocol} moves further than its window of {length} tokens, so it would skip some: "
            f"use a stride of at most {length}"
        )
    raise InputError(f"protocol {protocol} scores more tokens than its window of {length} has: use at most {length}")


def same_tokens(tokens: int, *, lengths: Sequence[int], protocols: Sequence[WindowProtocol]) -> SameTokens:
    """Return the tokens that all lengths score.

    Raises:
        InputError: see `place_windows`.
    """
    whole = [
        place_windows(tokens, length=length, protocol=protocol).scored
        for length, protocol in product(lengths, protocols)
        if protocol.last is None
    ]
    return SameTokens(span=min(whole, default=0), longest=max(lengths))


def place_windows(tokens: int, *, length: int, protocol: WindowProtocol, same: SameTokens | None = None) -> Windows:
    """Return the whole windows that fit into a text. A partial window at the end is dropped.

    * nonoverlapping: window i starts at token i * length and scores all its predictions.
    * sliding: window i starts at token i * stride. The first one scores all its predictions, each later one only its
      last `stride`: so all but the first window's see more than `length - stride` tokens.
    * last: windows lie as in nonoverlapping, and each scores its last predictions only.

    Args:
        tokens: Tokens of the text.
        length: Inputs of a window, and so its predictions; a window spans `length + 1` tokens.
        protocol: How the window moves.
        same: The tokens to score; None for all that the windows reach.
    Raises:
        InputError: length below 1, a protocol that does not fit it, or a text shorter than one window.
    """
    if length < 1:
        raise InputError(f"evaluation length must be 1 or more, got {length}")
    require_fit(protocol, length=length)
    if tokens < length + 1:
        hint = f"use at most {tokens - 1}, or more text" if tokens > 1 else "give more text"
        raise InputError(f"length {length} needs a text of {length + 1} tokens, this one has {tokens}: {hint}")
    if protocol.last is not None:
        step = length if same is None else same.longest
        starts = np.arange(step, tokens, step, dtype=np.int64) - length
        return Windows(length, starts, np.full_like(starts, length - protocol.last), np.full_like(starts, length))
    stride = length if protocol.stride is None else protocol.stride
    # The last input of a window needs a token after it to predict, so no window starts past tokens - 1 - length.
    starts = np.arange(0, tokens - length, stride, dtype=np.int64)
    scored_from = np.full_like(starts, length - stride)
    scored_from[0] = 0
    windows = Windows(length, starts, scored_from, np.full_like(starts, length))
    return windows if same is None else _up_to(windows, same.span)


def _up_to(windows: Windows, span: int) -> Windows:
    """Return the windows that score tokens 1 to `span`, and nothing behind them."""
    kept = windows.starts + windows.scored_from < span
    starts, scored_from, scored_to = (each[kept] for each in (windows.starts, windows.scored_from, windows.scored_to))
    return Windows(windows.length, starts, scored_from, np.minimum(scored_to, span - starts))
