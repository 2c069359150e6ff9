"""Process groups, counted in worlds that torch fakes in one process, and the timeout of each."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.deepspeed_engine import make_engine
from parallel.groups import make_groups, partitions_of
from parallel.layout import Layout
from parallel.pipeline import StagedModule
from parallel.start import COLLECTIVE_TIMEOUT, ProcessRank, start, stop
from tests.support.layouts import VOCABULARY, config_of
from tests.support.ranks import run_ranks
from training.model.decoder import Decoder, plan_layers

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class World:
    """A world of ranks in one layout, and how many groups each of its processes creates."""

    tensor: int
    pipeline: int
    data: int
    groups: int

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor, self.pipeline, self.data, zero=1, micro_batches=self.pipeline)

    def ranks(self) -> set[int]:
        """Ranks of the first, a middle and the last stage."""
        size = self.layout.world_size
        return {0, size // 2, size - 1}


WORLDS = (
    World(2, 1, 4, groups=3),
    World(2, 2, 2, groups=4),
    World(2, 4, 4, groups=5),
    World(4, 12, 8, groups=5),
    World(8, 8, 64, groups=5),
)


@dataclass
class Calls:
    """Groups that were created, with their timeouts; `registered` are the ranks of all groups of torch's registry."""

    new: list[timedelta | None] = field(default_factory=list)
    split: list[tuple[Any, timedelta | None]] = field(default_factory=list)
    registered: list[tuple[int, ...]] = field(default_factory=list)


@contextmanager
def fake_world(*, rank: int, size: int, gpu: bool = False) -> Iterator[Calls]:
    """Be one rank of a world in which nothing is sent; with a GPU, groups can be split as with NCCL."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    splits = gpu and patch.object(dist.ProcessGroup, "_get_backend", Mock(return_value=Mock(supports_splitting=True)))
    if gpu:
        dist.group.WORLD.bound_device_id = GPU
    calls, create = Calls(), dist.new_group

    def new_group(*arguments: Any, timeout: timedelta | None = None, **more: Any) -> Any:
        calls.new.append(timeout)
        return create(*arguments, timeout=timeout, **more)

    def split_group(*, split_ranks: list[list[int]], timeout: timedelta | None = None, **more: Any) -> Any:
        calls.split.append((split_ranks, timeout))
        mine = next(ranks for ranks in split_ranks if rank in ranks)
        return create(mine, timeout=timeout, use_local_synchronization=True)

    with (
        patch.object(dist, "new_group", new_group),
        patch.object(dist, "split_group", split_group),
        splits or nullcontext(),
    ):
        yield calls
    calls.registered = [tuple(dist.get_process_group_ranks(group)) for group in dist.distributed_c10d._world.pg_map]
    dist.destroy_process_group()


def build_fake_engine(world: World, *, folder: Path) -> None:
    layout = world.layout
    keys = {"tensor": world.tensor, "pipeline": world.pipeline}
    model = (f"model.layers={world.pipeline}", "model.heads=8", "model.position=t5")  # all stages share T5's table
    batch = (f"train.global_batch={world.pipeline * world.data}", "train.micro_batch=1")
    config = config_of(keys, run_dir=folder, more=(*model, *batch))
    groups = make_groups(layout)
    plan = plan_layers(config.model, vocab_size=VOCABULARY, tensor=groups.tensor, recompute=False)
    staged = layout.pipeline > 1
    module = StagedModule(plan, groups=groups, bounds=range(world.pipeline + 1)) if staged else Decoder(plan)
    make_engine(module, train=config.train, layout=layout, groups=groups, seed=1)


def count_groups(process: ProcessRank, *, folder: Path) -> dict[tuple[World, str, int], Calls]:
    stop()
    counted = {}
    for world in WORLDS:
        for rank in world.ranks():
            with fake_world(rank=rank, size=world.layout.world_size) as calls:
                build_fake_engine(world, folder=folder)
            counted[world, "engine", rank] = calls
            with fake_world(rank=rank, size=world.layout.world_size, gpu=True) as calls:
                make_groups(world.layout)
            counted[world, "gpu", rank] = calls
    start(replace(process, rendezvous=f"{process.rendezvous}_after"))
    return counted


def test_each_process_creates_each_axis_once(tmp_path: Path) -> None:
    (counted,) = run_ranks(count_groups, ranks=1, arguments={"folder": tmp_path})
    for (world, what, rank), calls in counted.items():
        created = [timeout for _, timeout in calls.split] + calls.new
        assert created == [COLLECTIVE_TIMEOUT] * world.groups, (world, what, rank)
        assert len(calls.registered) == len(set(calls.registered)) == world.groups + 1, (world, what, rank)
        if what == "gpu":  # one collective of the world each: all ranks pass the same partition of it
            assert not calls.new
            assert [ranks for ranks, _ in calls.split] == [ranks for ranks, _ in counted[world, what, 0].split]
            for partition, _ in calls.split:
                assert sorted(rank for ranks in partition for rank in ranks) == list(range(world.layout.world_size))


def test_ranks_are_numbered_tensor_first_then_data() -> None:
    assert partitions_of(Layout(2, 3, 2, zero=1, micro_batches=3)) == {
        "world": [list(range(12))],
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]],
        "pipeline": [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]],
        "data": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]],
        "model": [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]],
        "ends": [[0, 8], [1, 9], [2, 10], [3, 11], [4], [5], [6], [7]],
    }
    shared = partitions_of(Layout(2, 3, 2, zero=1, micro_batches=3, shares_matrices=True))
    assert shared["stage"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
