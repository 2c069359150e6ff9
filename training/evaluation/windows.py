"""Place windows over a text, and decide which predictions each one scores. Arithmetic only: no tensor, no model."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.protocols import WindowProtocol


@dataclass(frozen=True)
class Windows:
    """Windows of `length` inputs. Window i starts at token i * stride.

    The first window scores all its predictions, each later one only its last `stride`. So every prediction is scored
    once, and after the first window each has more than `length - stride` tokens of context.
    """

    length: int
    stride: int
    count: int

    @property
    def scored(self) -> int:
        """Number of predictions that all windows score: tokens 1 to `scored`."""
        return self.length + (self.count - 1) * self.stride

    def starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the first token of windows `first` to `last - 1`, [last - first], int64."""
        # `last` may be past the end: the last batch of windows may be a partial one.
        return np.arange(first, min(last, self.count), dtype=np.int64) * self.stride

    def first_scored(self, window: int) -> int:
        """Return the index of the first prediction that a window scores, counted within the window."""
        return 0 if window == 0 else self.length - self.stride


def require_stride(protocol: WindowProtocol, *, length: int) -> None:
    """Refuse a stride over the length of a window.

    Raises:
        InputError: it would skip tokens.
    """
    if protocol.stride is not None and protocol.stride > length:
        raise InputError(
            f"protocol {protocol} moves further than its window of {length} tokens, so it would skip some: "
            f"use a stride of at most {length}"
        )


def place_windows(tokens: int, *, length: int, protocol: WindowProtocol) -> Windows:
    """Return the whole windows that fit into a text. A partial window at the end is dropped.

    Args:
        tokens: Tokens of the text.
        length: Inputs of a window, and so its predictions; a window spans `length + 1` tokens.
        protocol: How the window moves.
    Raises:
        InputError: length below 1, a stride over the length, or a text shorter than one window.
    """
    if length < 1:
        raise InputError(f"evaluation length must be 1 or more, got {length}")
    require_stride(protocol, length=length)
    stride = length if protocol.stride is None else protocol.stride
    if tokens < length + 1:
        hint = f"use at most {tokens - 1}, or more text" if tokens > 1 else "give more text"
        raise InputError(f"length {length} needs a text of {length + 1} tokens, this one has {tokens}: {hint}")
    # The last input of a window needs a token after it to predict, so no window starts past tokens - 1 - length.
    return Windows(length=length, stride=stride, count=(tokens - 1 - length) // stride + 1)
