"""Collectives on Python values and errors: every rank of the group must call them at the same point.

A rank may come late, from work on a slow disk. So the ranks first wait for each other without a limit, and only then
enter torch's collective, which ends the job after its timeout.
"""

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from configs.errors import MachineError, TrainshortError
from parallel.axes import Group

T = TypeVar("T")

_LONGEST_PAUSE = 0.5  # seconds


def wait_for_all(group: Group) -> None:
    """Wait until every rank of the group has come here, however long that takes.

    Call it before a collective if a rank may come late, from a disk for example. A rank that has ended is never waited
    for in vain: the launcher, torchrun or `srun --kill-on-bad-exit` ends the others too.
    """
    if group.size == 1:
        return
    # Arrivals are counted in the store through which the ranks first met. All of a round arrive before any of the next.
    # The name keeps groups apart in a torch that gives them one store.
    store, key = group.handle.get_group_store(), f"arrived at {group.handle.group_desc}"
    arrived = store.add(key, 1)
    round_end = -(-arrived // group.size) * group.size
    pause = 0.005
    while arrived < round_end:
        time.sleep(pause)
        # Poll: while one thread waits in the store, NCCL's own threads cannot use it.
        pause = min(2 * pause, _LONGEST_PAUSE)
        arrived = int(store.get(key))


def all_gather_object(value: T, *, group: Group) -> list[T]:
    """Return every rank's value, by rank."""
    wait_for_all(group)
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
            if error.errno == errno.ENOMEM:  # not the disk: the rank says what it held
                raise
            where = f" {error.filename}" if error.filename else ""
            made = [MachineError(f"rank 0 cannot use the disk ({error.strerror}{where}): fix it and start again")]
    wait_for_all(group)
    dist.broadcast_object_list(made, group=group.handle, group_src=0)
    if isinstance(made[0], TrainshortError):
        raise made[0]
    return made[0]  # type: ignore[no-any-return]
