"""Work on whole matrices of which each rank holds a part: of its rows or columns, cut again by ZeRO.

Each matrix has one rank that does the work: the others send it their parts and get the results back. A rank sends and
gets about as much as it holds, in one exchange each, and the ranks share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axes import Group
from parallel.muon import Work
from parallel.parameter import Shard, local_shape


@dataclass(frozen=True)
class MatrixPart:
    """What this rank holds of a matrix, in one of the optimizer's tensors.

    Attributes:
        shard: The matrix.
        bounds: Where a tensor rank's slice, flattened, is cut into the parts of the data ranks: data rank d holds
            [bounds[d], bounds[d + 1]).
        offset: Where this rank's part begins in the optimizer's tensor, flattened.
    """

    shard: Shard
    bounds: tuple[int, ...]
    offset: int

    def size(self, data_rank: int) -> int:
        """Return how much a data rank holds."""
        return self.bounds[data_rank + 1] - self.bounds[data_rank]


def joined_then_cut(
    shards: Sequence[Shard], numels: Sequence[int], *, size: int, rank: int = 0, ranks: int = 1
) -> list[MatrixPart]:
    """Return a data rank's parts of slices that are joined and then cut evenly, as ZeRO 1 and 2 do.

    Args:
        shards: The matrices, or other parameters.
        numels: Elements of a tensor rank's slice of each.
        size: Elements of a part of all together.
        rank: The data rank.
        ranks: Number of data ranks.
    """
    begins = accumulate(numels, initial=0)
    return [
        MatrixPart(shard, _cuts(begin, numel, size=size, ranks=ranks), max(begin - rank * size, 0))
        for shard, numel, begin in zip(shards, numels, begins, strict=False)
    ]


def cut_then_joined(shards: Sequence[Shard], sizes: Sequence[tuple[int, int]], *, ranks: int) -> list[MatrixPart]:
    """Return a data rank's parts of slices that are each cut evenly, the parts being joined, as ZeRO 3 does.

    Args:
        shards: The matrices.
        sizes: Elements of a tensor rank's slice of each, and of a part of it, with padding.
        ranks: Number of data ranks.
    """
    begins = accumulate((size for _, size in sizes), initial=0)
    return [
        MatrixPart(shard, _cuts(0, numel, size=size, ranks=ranks), begin)
        for shard, (numel, size), begin in zip(shards, sizes, begins, strict=False)
    ]


def _cuts(begin: int, numel: int, *, size: int, ranks: int) -> tuple[int, ...]:
    """Return where [begin, begin + numel) is cut by the multiples of a size, from its own beginning."""
    return tuple(min(max(rank * size - begin, 0), numel) for rank in range(ranks + 1))


class WholeMatrices:
    """The matrices of an optimizer's tensors, and which rank works on which."""

    def __init__(
        self, parts: dict[Tensor, list[MatrixPart]], *, tensor: int, group: Group, device: torch.device
    ) -> None:
        """Take the parts of this rank.

        Args:
            parts: By the optimizer's tensor; the same matrices in the same order on all ranks of the group.
            tensor: Number of tensor ranks.
            group: The ranks that hold parts: all tensor ranks of the first data rank, of the second, and so on.
            device: Where to work and exchange.
        """
        self._parts, self._tensor, self._group, self._device = parts, tensor, group, device

    def __call__(self, tensors: Sequence[Tensor], values: Sequence[Tensor], work: Work) -> None:
        """Apply a function of whole matrices in place. A collective of the group.

        Args:
            tensors: Some of the optimizer's.
            values: As large as they: values of their matrices, contiguous.
            work: Takes a matrix's shard and whole value, and returns a value of the same shape.
        """
        pairs = zip(tensors, values, strict=True)
        held = [(part, self._cut(value, part)) for tensor, value in pairs for part in self._parts[tensor]]
        if self._group.size == 1:
            for part, value in held:
                value.copy_(work(part.shard, value.to(self._device).view(part.shard.shape)).flatten())
            return
        places = shared_out([part.shard for part, _ in held], ranks=self._group.size)
        ordered = [held[place][1] for each in places for place in each]  # by the rank that works on them
        sizes = [sum(held[place][1].numel() for place in each) for each in places]
        own = [held[place][0] for place in places[self._group.rank]]
        own_sizes = [sum(part.size(self._data_rank(rank)) for part in own) for rank in range(self._group.size)]
        sent = torch.cat([value.to(self._device) for value in ordered])
        received = sent.new_empty(sum(own_sizes))
        dist.all_to_all_single(received, sent, own_sizes, sizes, group=self._group.handle)
        self._work(own, torch.split(received, own_sizes), work)
        dist.all_to_all_single(sent, received, sizes, own_sizes, group=self._group.handle)
        for value, result in zip(ordered, torch.split(sent, [value.numel() for value in ordered]), strict=True):
            value.copy_(result)

    def _data_rank(self, rank: int) -> int:
        return rank // self._tensor

    def _cut(self, value: Tensor, part: MatrixPart) -> Tensor:
        return value.view(-1)[part.offset : part.offset + part.size(self._data_rank(self._group.rank))]

    def _work(self, own: Sequence[MatrixPart], received: Sequence[Tensor], work: Work) -> None:
        """Put the results of this rank's matrices in the place of their parts.

        Args:
            own: This rank's part of each of its matrices.
            received: What each rank of the group has sent: its parts of these matrices, one after the other.
            work: See `__call__`.
        """
        sizes = [[part.size(self._data_rank(rank)) for part in own] for rank in range(self._group.size)]
        by_rank = [torch.split(values, each) for values, each in zip(received, sizes, strict=True)]
        for part, *pieces in zip(own, *by_rank, strict=True):
            dim = part.shard.dim
            assert dim is not None, f"{part.shard.name} is not split over tensor ranks"
            shape = local_shape(part.shard, tensor_rank=0, tensor_size=self._tensor)
            of_tensor_ranks = [pieces[rank :: self._tensor] for rank in range(self._tensor)]  # each by data rank
            whole = torch.cat([torch.cat(each).view(shape) for each in of_tensor_ranks], dim=dim)
            for each, result in zip(of_tensor_ranks, work(part.shard, whole).chunk(self._tensor, dim), strict=True):
                for piece, value in zip(
                    each, torch.split(result.flatten(), [len(piece) for piece in each]), strict=True
                ):
                    piece.copy_(value)


def shared_out(shards: Sequence[Shard], *, ranks: int) -> list[list[int]]:
    """Return the places in `shards` of the matrices that each rank works on: about as many multiplications for all."""
    costs = [prod(shard.shape) * min(shard.shape) for shard in shards]
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    places: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, rank = loads[0]
        heapreplace(loads, (load + costs[place], rank))
        places[rank].append(place)
    return places
