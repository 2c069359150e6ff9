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
    """The axes of a layout.

    Attributes:
        grid: DeepSpeed's description of the axes; None in a world of one.
        stage: All ranks of this rank's pipeline stage, the tensor ranks of data rank 0 first; None unless the layout
            asks for it.
    """

    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    grid: Any
    stage: Group | None = None
