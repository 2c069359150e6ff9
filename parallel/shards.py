"""What each parameter is, in any layout: its name, its whole shape, and which slice a tensor rank holds.

A parameter declares this when it is made. Initial weights, checkpoints and export all go through it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from parallel.groups import Group

Rule = Literal["replicated", "column", "row", "vocabulary"]
_DIM: dict[Rule, int | None] = {"replicated": None, "column": 0, "row": 1, "vocabulary": 0}


@dataclass(frozen=True)
class Shard:
    """A parameter's declaration.

    Attributes:
        name: Logical name, the same in every layout.
        shape: Whole shape, without padding.
        rule: How tensor ranks split it; vocabulary is padded with rows of zeros to divide.
        init_std: Std of the initial normal values; None for a constant.
        constant: Initial value where init_std is None.
        tied: Several pipeline stages hold it and keep it equal; the first one's is saved.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    init_std: float | None = None
    constant: float = 0.0
    tied: bool = False

    @property
    def dim(self) -> int | None:
        """The tensor dimension that is split, or None."""
        return _DIM[self.rule]


def declare(parameter: nn.Parameter, shard: Shard) -> None:
    """Attach a declaration to a parameter, and megatron's marks that make norms and clipping right."""
    parameter.shard = shard  # type: ignore[attr-defined]
    # Unmarked parameters count once, on tensor rank 0, in the global gradient norm.
    if shard.dim is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = shard.dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]


def declared(module: nn.Module) -> dict[str, tuple[nn.Parameter, Shard]]:
    """Return a module's parameters by logical name.

    Raises:
        AssertionError: a parameter declares nothing.
    """
    found = {}
    for path, parameter in module.named_parameters():
        shard = getattr(parameter, "shard", None)
        assert isinstance(shard, Shard), f"parameter {path} declares no name and rule: call declare() where it is made"
        found[shard.name] = (parameter, shard)
    return found


def span(shard: Shard, *, tensor_rank: int, tensor_size: int) -> tuple[int, int]:
    """Return the [start, stop) of the split dimension that a tensor rank holds, padding left out."""
    assert shard.dim is not None, f"{shard.name} is not split"
    length = shard.shape[shard.dim]
    size = -(-length // tensor_size)
    start = min(tensor_rank * size, length)
    return start, min(start + size, length)


def padded_rows(shard: Shard, *, tensor_size: int) -> int:
    """Return the rows of zeros that make all tensor ranks' slices equal."""
    return 0 if shard.dim is None else -shard.shape[shard.dim] % tensor_size


def cut(whole: Tensor, *, shard: Shard, tensor: Group) -> Tensor:
    """Return a tensor rank's slice of a whole tensor, padded with zero rows where the vocabulary needs it."""
    assert tuple(whole.shape) == shard.shape, f"{shard.name} is {tuple(whole.shape)}, declared {shard.shape}"
    if shard.dim is None:
        return whole
    start, stop = span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
    return pad(whole.narrow(shard.dim, start, stop - start), shard=shard, tensor=tensor)


def pad(part: Tensor, *, shard: Shard, tensor: Group) -> Tensor:
    """Return a tensor rank's real rows with the zero rows that make all ranks' slices equal."""
    if shard.dim is None:
        return part
    missing = -(-shard.shape[shard.dim] // tensor.size) - part.shape[shard.dim]
    if not missing:
        return part
    assert shard.rule == "vocabulary", f"{shard.name} does not divide over {tensor.size} tensor ranks"
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
