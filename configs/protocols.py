"""How windows move over a text that is evaluated, and how a run file and the command line name it."""

import re
from dataclasses import dataclass

from configs.errors import InputError

# what messages and help offer
PROTOCOL_NAMES = "nonoverlapping, sliding:STRIDE or last:TOKENS"


@dataclass(frozen=True)
class WindowProtocol:
    """How a window moves over a text, and which of its predictions it scores.

    Attributes:
        stride: Tokens that the window moves by, and of which it scores the predictions; None for its own length.
        last: Predictions that each window scores, if it moves by its own length; None for all.
    Source: Press et al. 2022, appendix B.
    """

    stride: int | None
    last: int | None = None

    @property
    def name(self) -> str:
        """Name in a report: nonoverlapping, sliding or last."""
        if self.last is not None:
            return "last"
        return "nonoverlapping" if self.stride is None else "sliding"

    @property
    def scored(self) -> int | None:
        """Predictions that a window scores after the first one, the last ones; None for all."""
        return self.last if self.stride is None else self.stride

    def __str__(self) -> str:
        return self.name if self.scored is None else f"{self.name}:{self.scored}"


def parse_protocol(text: str) -> WindowProtocol:
    """Parse `nonoverlapping`, `sliding:STRIDE` or `last:TOKENS`.

    Raises:
        InputError: another name, or a number that is not a whole number above 0.
    """
    if text == "nonoverlapping":
        return WindowProtocol(stride=None)
    match = re.fullmatch(r"(sliding|last):(0|[1-9][0-9]*)", text)
    if match is None:
        raise InputError(f"protocol {text!r} is not known: use {PROTOCOL_NAMES}")
    number = int(match[2])
    if match[1] == "last":
        if number == 0:
            raise InputError(f"protocol {text!r} scores no tokens: use 1 or more")
        return WindowProtocol(stride=None, last=number)
    if number == 0:
        raise InputError(f"protocol {text!r} has stride 0, so its window would not move: use a stride of 1 or more")
    return WindowProtocol(stride=number)
