"""What each parameter is, in any layout: its name, its whole shape, and which slice a tensor rank holds.

A parameter declares this when it is made. Initial weights, checkpoints and export all go through it.
"""

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard, span


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
