"""Process groups as values: code that needs a rank or a size is given a `Group`. Imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """This process's place on one axis.

    Attributes:
        rank: Place in the group.
        size: Ranks in the group.
        handle: The torch process group.
    """

    rank: int
    size: int
    handle: Any


@dataclass(frozen=True)
class Groups:
    """The axes of a layout; `grid` is the same for DeepSpeed, None in a world without it."""

    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    grid: Any
