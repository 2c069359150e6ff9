"""Create the process groups of a layout, each once, for our own collectives, megatron-core and DeepSpeed alike."""

from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist

from parallel.axes import Group, Groups
from parallel.layout import Layout
from parallel.libraries import (
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    deepspeed,
    deepspeed_backend,
    deepspeed_comm,
)
from parallel.start import COLLECTIVE_TIMEOUT

Partition = list[list[int]]


def make_groups(layout: Layout) -> Groups:
    """Create the groups of a layout; every rank of the world must call it at the same point.

    World ranks are numbered tensor fastest, then data, then pipeline. docs/decisions/0025 counts the groups.
    """
    join_deepspeed()
    handles = _create(partitions_of(layout))
    _share(handles)
    with redirect_stdout(StringIO()):
        grid = PipelineParallelGrid(
            topology=PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        )
    return _groups(handles, grid=grid)


def partitions_of(layout: Layout) -> dict[str, Partition]:
    """Return the world's ranks cut into groups, once for each purpose that needs groups."""
    mesh = torch.arange(layout.world_size).view(layout.pipeline, layout.data, layout.tensor)
    stages = mesh.permute(1, 2, 0).reshape(-1, layout.pipeline)
    cuts: dict[str, Partition] = {
        "world": mesh.view(1, -1).tolist(),
        "tensor": mesh.view(-1, layout.tensor).tolist(),
        "pipeline": stages.tolist(),
        "data": mesh.transpose(1, 2).reshape(-1, layout.data).tolist(),
        # one copy of the model: DeepSpeed sums the gradient norm over it
        "model": mesh.transpose(0, 1).reshape(layout.data, -1).tolist(),
    }
    if layout.shares_matrices:
        cuts["stage"] = mesh.view(layout.pipeline, -1).tolist()
    if layout.pipeline > 2:
        # The first and the last stage share the word embedding. Nobody uses the groups of the stages between them, but
        # every rank must create as many groups as the others: torch numbers them, and a number is part of a name.
        cuts["ends"] = [*stages[:, [0, -1]].tolist(), *stages[:, 1:-1].tolist()]
    return cuts


def lone_groups() -> Groups:
    """Return the groups of a world of one, for a model in one process."""
    handles = dict.fromkeys(("world", "tensor", "pipeline", "data"), dist.group.WORLD)
    return _groups(handles, grid=None)


def join_deepspeed() -> None:
    """Let DeepSpeed use the existing process group, without compiling anything."""
    # At the first start on CPU ranks DeepSpeed would compile a shared-memory all-reduce with g++, which takes a minute.
    deepspeed_backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _create(partitions: Mapping[str, Partition]) -> dict[str, Any]:
    """Create this rank's group of each partition; equal partitions share their groups."""
    by_partition: dict[str, Any] = {str(partitions["world"]): dist.group.WORLD}
    handles = {}
    for name, partition in partitions.items():
        key = str(partition)
        if key not in by_partition:
            by_partition[key] = _create_group(partition, purpose=name)
        handles[name] = by_partition[key]
    return handles


def _create_group(partition: Partition, *, purpose: str) -> Any:
    mine = next(ranks for ranks in partition if dist.get_rank() in ranks)
    name = f"{purpose} from rank {mine[0]}"
    if _can_split():
        # NCCL cuts its communicator of the world into all groups of the partition in one collective of the world.
        # `new_group` would need such a collective for each of them, from ranks that are in none.
        return dist.split_group(split_ranks=partition, timeout=COLLECTIVE_TIMEOUT, group_desc=name)
    return dist.new_group(mine, timeout=COLLECTIVE_TIMEOUT, use_local_synchronization=True, group_desc=name)


def _can_split() -> bool:
    world: Any = dist.group.WORLD
    device = world.bound_device_id
    return device is not None and world._get_backend(device).supports_splitting


def _share(handles: Mapping[str, Any]) -> None:
    """Give DeepSpeed these groups instead of groups of its own; megatron's layers are handed theirs."""
    of_ranks = {tuple(dist.get_process_group_ranks(handle)): handle for handle in handles.values()}

    def group_of(ranks: Iterable[int]) -> Any:
        wanted = tuple(ranks)
        if dist.get_rank() not in wanted:
            return dist.GroupMember.NON_GROUP_MEMBER
        assert wanted in of_ranks, f"DeepSpeed wants a group of the ranks {wanted}, which no axis of the layout has"
        return of_ranks[wanted]

    # DeepSpeed creates all its groups through this function.
    deepspeed_comm.cdb.new_group = group_of


def _groups(handles: Mapping[str, Any], *, grid: Any) -> Groups:
    world, tensor, pipeline, data = (_group(handles[axis]) for axis in ("world", "tensor", "pipeline", "data"))
    stage = _group(handles["stage"]) if "stage" in handles else None
    return Groups(world=world, tensor=tensor, pipeline=pipeline, data=data, grid=grid, stage=stage)


def _group(handle: Any) -> Group:
    return Group(rank=dist.get_rank(handle), size=dist.get_world_size(handle), handle=handle)
