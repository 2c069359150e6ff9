"""Collectives on Python values and errors: every rank of the group must call them at the same point."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import MachineError, TrainshortError
from parallel.axes import Group

T = TypeVar("T")


def all_gather_object(value: T, *, group: Group) -> list[T]:
    """Return every rank's value, by rank."""
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def raise_everywhere(problem: TrainshortError | None, *, group: Group) -> None:
    """Raise the first problem, by rank, on every rank, so that no rank waits for one that failed.

    Raises:
        TrainshortError: a rank has a problem.
    """
    for first in filter(None, all_gather_object(problem, group=group)):
        raise first


def broadcast_from_first(make: Callable[[], T], *, group: Group) -> T:
    """Call `make` on rank 0 and return its result on every rank.

    Raises:
        TrainshortError: `make` raised it, or rank 0 cannot use its disk; raised on every rank.
    """
    made: list[Any] = [None]
    if group.rank == 0:
        try:
            made = [make()]
        except TrainshortError as error:
            made = [error]
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            made = [MachineError(f"rank 0 cannot use the disk ({error.strerror}{where}): fix it and start again")]
    dist.broadcast_object_list(made, group=group.handle, group_src=0)
    if isinstance(made[0], TrainshortError):
        raise made[0]
    return made[0]  # type: ignore[no-any-return]
