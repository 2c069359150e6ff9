"""Parameters with their shards, and tensors cut into a tensor rank's slice.

A parameter is declared when it is built. Initial weights, checkpoints and export go through the declaration.
"""

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard, padded_shape, span


def declare(parameter: nn.Parameter, shard: Shard) -> None:
    """Attach a shard to a parameter, and the attributes that megatron and DeepSpeed read to compute norms."""
    parameter.shard = shard  # type: ignore[attr-defined]
    # An unmarked parameter is the same on all tensor ranks: the gradient norm counts it once, on tensor rank 0.
    if shard.dim is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = shard.dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]


def declared(module: nn.Module) -> dict[str, tuple[nn.Parameter, Shard]]:
    """Return a module's parameters by logical name.

    Raises:
        AssertionError: a parameter was not declared.
    """
    return {shard_of(parameter).name: (parameter, shard_of(parameter)) for parameter in module.parameters()}


def shard_of(parameter: nn.Parameter) -> Shard:
    """Return the shard that a parameter was declared with.

    Raises:
        AssertionError: it was not declared.
    """
    shard = getattr(parameter, "shard", None)
    shape = tuple(parameter.shape)
    assert isinstance(shard, Shard), f"a parameter {shape} declares no name and rule: call declare() where it is built"
    return shard


def cut(whole: Tensor, *, shard: Shard, tensor: Group) -> Tensor:
    """Return a tensor rank's slice of a whole tensor; a vocabulary is padded with rows of zeros."""
    assert tuple(whole.shape) == shard.shape, f"{shard.name} is {tuple(whole.shape)}, declared {shard.shape}"
    if shard.dim is None:
        return whole
    start, stop = span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
    return pad(whole.narrow(shard.dim, start, stop - start), shard=shard, tensor=tensor)


def pad(part: Tensor, *, shard: Shard, tensor: Group) -> Tensor:
    """Pad a tensor rank's rows with zeros, so that all ranks' slices are equal in size."""
    if shard.dim is None:
        return part
    padding = padded_shape(shard, tensor_size=tensor.size)[shard.dim] - part.shape[shard.dim]
    if not padding:
        return part
    return torch.cat([part, part.new_zeros(padding, *part.shape[1:])])
