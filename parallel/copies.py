"""Keep a parameter's copies equal: on tensor ranks that do not split it, and on pipeline stages that share it.

Each copy is reduced and stepped on its own rank. The sums that reach them may be added in another order, because NCCL
chooses it per communicator, so copies can drift apart by rounding. A checkpoint holds only the first copy.
"""

import hashlib
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from parallel.axes import Group, Groups
from parallel.collectives import all_gather_object
from parallel.engine import State


def equalize_copies(state: State, *, groups: Groups) -> list[str]:
    """Compare the copies of each parameter, and end a difference: the first rank's weight and moments win.

    A collective: every rank calls it.

    Returns:
        What differed, on any rank, in words; the same on every rank.
    """
    shards = [shard for _, shard in state.parameters.values()]
    whole = [shard.name for shard in shards if shard.dim is None]
    tied = [shard.name for shard in shards if shard.tied]
    differences = [
        *_equalize(state, whole, axis="tensor", group=groups.tensor),
        *_equalize(state, tied, axis="pipeline", group=groups.pipeline),
    ]
    return sorted(set().union(*all_gather_object(differences, group=groups.world)))


def _equalize(state: State, names: Iterable[str], *, axis: str, group: Group) -> list[str]:
    if group.size == 1:
        return []
    mine = {(name, kind): _digest(state.read(name, kind)) for name in names for kind in state.kinds_of(name)}
    digests = all_gather_object(mine, group=group)
    differences = []
    for name, kind in sorted(set().union(*digests)):
        ranks = [rank for rank, held in enumerate(digests) if (name, kind) in held]
        first, *others = ranks
        unequal = [rank for rank in others if digests[rank][name, kind] != digests[first][name, kind]]
        if not unequal:
            continue
        differences.append(f"{name} {kind} on {axis} rank {', '.join(map(str, unequal))} and on {first}")
        if group.rank in (first, *unequal):
            value = state.read(name, kind)
            _send(value, first=first, others=unequal, group=group)
            state.write(name, kind, value)
    return differences


def _send(value: Tensor, *, first: int, others: list[int], group: Group) -> None:
    """Copy the first rank's value into the others'."""
    if group.rank == first:
        for other in others:
            dist.send(value, group=group.handle, group_dst=other)
    else:
        dist.recv(value, group=group.handle, group_src=first)


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().cpu().numpy().data).hexdigest()
