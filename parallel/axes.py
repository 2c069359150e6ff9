"""Process groups as values: code that needs a rank or a size is given a `Group`. Imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """This process's place on one axis of the layout.

    Attributes:
        rank: This process's rank in the group.
        size: Number of ranks in the group.
        handle: The torch process group.
    """

    rank: int
    size: int
    handle: Any


@dataclass(frozen=True)
class Groups:
    """The axes of a layout; `grid` is DeepSpeed's description of them, None in a world of one."""

    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    grid: Any
