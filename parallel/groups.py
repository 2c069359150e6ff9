"""Create the process groups of a layout."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch.distributed as dist

from parallel.axes import Group, Groups
from parallel.layout import Layout
from parallel.libraries import (
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    deepspeed,
    deepspeed_backend,
    parallel_state,
)


def make_groups(layout: Layout) -> Groups:
    """Create the groups of a layout; every rank of the world must call it at the same point.

    megatron-core and DeepSpeed each create their own groups, because their layers look them up. Both number the
    ranks in the same order: tensor fastest, then data, then pipeline. The groups returned are megatron's.
    """
    join_deepspeed()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        create_gloo_process_groups=False,
    )
    with redirect_stdout(StringIO()):
        grid = PipelineParallelGrid(
            topology=PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        )
    return _groups(grid=grid)


def join_deepspeed() -> None:
    """Let DeepSpeed use the existing process group, without compiling anything."""
    # At the first start on CPU ranks DeepSpeed would compile a shared-memory all-reduce with g++, which takes a minute.
    deepspeed_backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def lone_groups() -> Groups:
    """Return the groups of a world of one, for a model in one process."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    return _groups(grid=None)


def _groups(*, grid: Any) -> Groups:
    return Groups(
        world=_group(dist.group.WORLD),
        tensor=_group(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_group(parallel_state.get_pipeline_model_parallel_group()),
        data=_group(parallel_state.get_data_parallel_group()),
        grid=grid,
    )


def _group(handle: Any) -> Group:
    return Group(rank=dist.get_rank(handle), size=dist.get_world_size(handle), handle=handle)
