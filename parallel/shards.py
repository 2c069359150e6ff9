"""Parameters with their shards, and tensors cut into a tensor rank's slice.

A parameter is declared when it is built. Initial weights, checkpoints and export go through the declaration.
"""

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard, span


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
    parameters = {}
    for path, parameter in module.named_parameters():
        shard = getattr(parameter, "shard", None)
        assert isinstance(shard, Shard), f"parameter {path} declares no name and rule: call declare() where it is built"
        parameters[shard.name] = (parameter, shard)
    return parameters


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
    padding = -(-shard.shape[shard.dim] // tensor.size) - part.shape[shard.dim]
    if not padding:
        return part
    assert shard.rule == "vocabulary", f"{shard.name} does not divide over {tensor.size} tensor ranks"
    return torch.cat([part, part.new_zeros(padding, *part.shape[1:])])
