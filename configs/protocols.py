"""How windows move over a text that is evaluated, and how a run file and the command line name it."""

import re
from dataclasses import dataclass

from configs.errors import InputError


@dataclass(frozen=True)
class WindowProtocol:
    """How a window moves over a text: by its own length (stride None), or by a stride.

    Source: Press et al. 2022, appendix B.
    """

    stride: int | None

    @property
    def name(self) -> str:
        """Name in a report: nonoverlapping or sliding."""
        return "nonoverlapping" if self.stride is None else "sliding"

    def __str__(self) -> str:
        return self.name if self.stride is None else f"{self.name}:{self.stride}"


def parse_protocol(text: str) -> WindowProtocol:
    """Parse `nonoverlapping` or `sliding:STRIDE`.

    Raises:
        InputError: another name, or a stride that is not a whole number above 0.
    """
    if text == "nonoverlapping":
        return WindowProtocol(stride=None)
    match = re.fullmatch(r"sliding:(0|[1-9][0-9]*)", text)
    if match is None:
        raise InputError(f"protocol {text!r} is not known: use nonoverlapping or sliding:STRIDE")
    if int(match[1]) == 0:
        raise InputError(f"protocol {text!r} has stride 0, so its window would not move: use a stride of 1 or more")
    return WindowProtocol(stride=int(match[1]))
