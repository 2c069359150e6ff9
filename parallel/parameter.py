"""A parameter in any layout: its name, whole shape, split rule and initial values. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

Rule = Literal["replicated", "column", "row", "vocabulary"]
_DIM: dict[Rule, int | None] = {"replicated": None, "column": 0, "row": 1, "vocabulary": 0}


@dataclass(frozen=True)
class Shard:
    """A parameter's declaration.

    Attributes:
        name: Logical name, the same in every layout.
        shape: Whole shape, without padding.
        rule: How tensor ranks split it; a vocabulary is padded with rows of zeros to divide evenly.
        init_std: Std of the initial normal values; None for a constant.
        constant: Initial value if init_std is None.
        decays: Whether the optimizer's weight decay applies to it.
        heads: Of a fused query, key and value, whose rows are ordered by head, part, dim; None for others.
        tied: Whether several pipeline stages hold it and keep it equal; the first stage saves it.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    init_std: float | None = None
    constant: float = 0.0
    decays: bool = False
    heads: int | None = None
    tied: bool = False

    @property
    def dim(self) -> int | None:
        """The tensor dimension that is split, or None."""
        return _DIM[self.rule]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight matrix of a block, which no embedding, head or table of positions is."""
        return self.name.startswith("blocks.") and len(self.shape) == 2


def span(shard: Shard, *, tensor_rank: int, tensor_size: int) -> tuple[int, int]:
    """Return the [start, stop) of the split dimension that a tensor rank holds, without padding."""
    assert shard.dim is not None, f"{shard.name} is not split"
    length = shard.shape[shard.dim]
    size = -(-length // tensor_size)
    start = min(tensor_rank * size, length)
    return start, min(start + size, length)


def local_shape(shard: Shard, *, tensor_rank: int, tensor_size: int) -> tuple[int, ...]:
    """Return the shape of a tensor rank's slice, without padding."""
    if shard.dim is None:
        return shard.shape
    start, stop = span(shard, tensor_rank=tensor_rank, tensor_size=tensor_size)
    return (*shard.shape[: shard.dim], stop - start, *shard.shape[shard.dim + 1 :])


def padded_rows(shard: Shard, *, tensor_size: int) -> int:
    """Return how many rows of zeros make all tensor ranks' slices equal in size."""
    return 0 if shard.dim is None else -shard.shape[shard.dim] % tensor_size


def padded_shape(shard: Shard, *, tensor_size: int) -> tuple[int, ...]:
    """Return the shape of each tensor rank's slice, with padding: the same on all of them."""
    if shard.dim is None:
        return shard.shape
    padding = padded_rows(shard, tensor_size=tensor_size)
    assert not padding or shard.rule == "vocabulary", f"{shard.name} does not divide over {tensor_size} tensor ranks"
    size = (shard.shape[shard.dim] + padding) // tensor_size
    return (*shard.shape[: shard.dim], size, *shard.shape[shard.dim + 1 :])
