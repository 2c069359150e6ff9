"""What ranks must know alike before they go on: a value that one made, a problem that one met."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import MachineError, TrainshortError
from parallel.axes import Group

T = TypeVar("T")


def all_gather_object(value: T, *, group: Group) -> list[T]:
    """Return every rank's value, by rank; a collective."""
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, value, group=group.handle)
    return found


def raise_everywhere(problem: TrainshortError | None, *, group: Group) -> None:
    """Raise the first problem that any rank has on every rank; a collective, so that none waits for one that gave up.

    Raises:
        TrainshortError: a rank has one.
    """
    for found in all_gather_object(problem, group=group):
        if found is not None:
            raise found


def broadcast_from_first(make: Callable[[], T], *, group: Group) -> T:
    """Return what rank 0 makes, on every rank; a collective.

    Raises:
        TrainshortError: rank 0 could not, or its disk failed; raised on every rank.
    """
    made: list[Any] = [None]
    if group.rank == 0:
        try:
            made = [make()]
        except TrainshortError as error:
            made = [error]
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            made = [MachineError(f"rank 0 cannot use the disk ({error.strerror}{where}): mend it and start again")]
    dist.broadcast_object_list(made, group=group.handle, group_src=0)
    if isinstance(made[0], TrainshortError):
        raise made[0]
    return made[0]  # type: ignore[no-any-return]
