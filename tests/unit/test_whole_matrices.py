"""Each matrix is worked on whole, by one rank, however it is cut; simulated ranks, each in a thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from threading import Barrier, BrokenBarrierError, local
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.axes import Group
from parallel.parameter import Rule, Shard
from parallel.whole_matrices import MatrixPart, WholeMatrices, cut_then_joined, joined_then_cut, shared_out

CPU = torch.device("cpu")


@dataclass
class Exchange:
    """torch's all_to_all_single among threads."""

    ranks: int
    me: Any = field(default_factory=local)
    calls: int = 0

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.ranks, timeout=30)
        self.sent: dict[int, list[Tensor]] = {}

    def __call__(self, target: Tensor, source: Tensor, received: list[int], sent: list[int], group: object) -> None:
        assert group is self
        self.sent[self.me.rank] = [part.clone() for part in torch.split(source, sent)]
        self.barrier.wait()
        parts = [self.sent[rank][self.me.rank] for rank in range(self.ranks)]
        self.barrier.wait()
        assert [len(part) for part in parts] == received
        target.copy_(torch.cat(parts))


def work(shard: Shard, whole: Tensor) -> Tensor:
    """Return what only a whole matrix gives: each element less those beside, above and in the far corner."""
    assert whole.shape == shard.shape
    return 3 * whole - whole.roll(1, 0) - whole.roll(1, 1) + whole[-1, -1]


def parts_of(
    shards: list[Shard], *, tensor: int, rank: int, data: int, joins_first: bool
) -> tuple[list[MatrixPart], int]:
    """Return a data rank's parts, and the size of all together with padding."""
    numels = [prod(shard.shape) // tensor for shard in shards]
    if joins_first:
        size = -(-sum(numels) // data)
        return joined_then_cut(shards, numels, size=size, rank=rank, ranks=data), size
    sizes = [(numel, -(-numel // data)) for numel in numels]
    return cut_then_joined(shards, sizes, ranks=data), sum(size for _, size in sizes)


matrices = st.lists(
    st.tuples(st.sampled_from(["column", "row"]), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(matrices, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]), st.booleans())
def test_results_are_those_of_whole_matrices(
    drawn: list[tuple[Rule, int, int]], tensor: int, data: int, joins_first: bool
) -> None:
    shards = [Shard(f"blocks.{i}.a.weight", (m * tensor, n * tensor), rule) for i, (rule, m, n) in enumerate(drawn)]
    wholes = [torch.randn(shard.shape, generator=torch.Generator().manual_seed(i)) for i, shard in enumerate(shards)]
    exchange = Exchange(tensor * data)

    def slices(of: int) -> list[Tensor]:
        pairs = zip(wholes, shards, strict=True)
        return [whole.chunk(tensor, shard.dim or 0)[of].reshape(-1) for whole, shard in pairs]

    def one_rank(rank: int) -> list[tuple[Tensor, Tensor]]:
        """Return the results that a rank has, each with what it should be."""
        exchange.me.rank = rank
        data_rank, tensor_rank = divmod(rank, tensor)
        parts, size = parts_of(shards, tensor=tensor, rank=data_rank, data=data, joins_first=joins_first)
        held = torch.zeros(size)
        bounds = [slice(part.bounds[data_rank], part.bounds[data_rank + 1]) for part in parts]
        places = [held[part.offset :][: part.size(data_rank)] for part in parts]
        for place, piece, mine in zip(places, bounds, slices(tensor_rank), strict=True):
            place.copy_(mine[piece])
        group = Group(rank, tensor * data, exchange)
        WholeMatrices({held: parts}, tensor=tensor, group=group, device=CPU)([held], [held], work)
        results = [
            work(shard, whole).chunk(tensor, shard.dim or 0) for shard, whole in zip(shards, wholes, strict=True)
        ]
        return [
            (place, result[tensor_rank].reshape(-1)[piece])
            for place, piece, result in zip(places, bounds, results, strict=True)
        ]

    def safely(rank: int) -> list[tuple[Tensor, Tensor]]:
        try:
            return one_rank(rank)
        except BrokenBarrierError:
            return []  # another rank has failed
        except Exception as error:
            exchange.barrier.abort()
            raise AssertionError(f"rank {rank}") from error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(tensor * data) as threads:
        patch.setattr(dist, "all_to_all_single", exchange)
        for result, expected in chain.from_iterable(threads.map(safely, range(tensor * data))):
            assert torch.equal(result, expected)


def test_the_ranks_share_the_work() -> None:
    shapes = [(wide * 64, 64) for _ in range(25) for wide in (1, 4)]
    shards, cost = [Shard("blocks.0.a.weight", shape, "column") for shape in shapes], [prod(s) * 64 for s in shapes]
    for ranks in (1, 4, 7):
        places = shared_out(shards, ranks=ranks)
        assert sorted(place for each in places for place in each) == list(range(len(shards)))
        loads = [sum(cost[place] for place in each) for each in places]
        assert max(loads) <= sum(cost) / ranks + max(cost)
    assert shared_out(shards[:1], ranks=3) == [[0], [], []]
