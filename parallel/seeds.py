"""Seeds by purpose, derived from the run's seed: the same on every machine and in every layout."""

import hashlib

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard
from parallel.shards import cut, declared


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose of a run."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def initial_weights(module: nn.Module, *, seed: int, tensor: Group) -> None:
    """Fill a module's declared parameters with the run's initial weights.

    Each whole tensor is drawn on the CPU with a seed from its name, then cut, so that the weights are the same in every
    layout and on every device.
    """
    for parameter, shard in declared(module).values():
        with torch.no_grad():
            parameter.copy_(cut(_initial(shard, seed=seed), shard=shard, tensor=tensor))


def _initial(shard: Shard, *, seed: int) -> Tensor:
    if shard.init_std is None:
        return torch.full(shard.shape, shard.constant)
    generator = torch.Generator().manual_seed(seed_for(seed, "weights", shard.name))
    return torch.randn(shard.shape, generator=generator) * shard.init_std
