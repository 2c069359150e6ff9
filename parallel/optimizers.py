"""The optimizers. `configs.choices` has a row for each, with the state that it keeps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from configs.precisions import PRECISIONS
from configs.schema import Train
from parallel.muon import Muon
from parallel.parameter import Shard
from parallel.shards import shard_of


def adamw(parameters: Iterable[nn.Parameter], *, train: Train) -> torch.optim.Optimizer:
    """Return AdamW over two groups: the parameters that are declared to decay, and the others.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    return torch.optim.AdamW(_groups(parameters, train, lambda shard: shard.decays), **_adamw_arguments(train))


def muon(parameters: Iterable[nn.Parameter], *, train: Train) -> torch.optim.Optimizer:
    """Return Muon for the weight matrices of blocks, and AdamW for the others; see `parallel.muon` for the sources."""
    groups = _groups(parameters, train, lambda shard: (shard.is_matrix, shard.decays))
    for group in groups:
        group["of_matrices"] = shard_of(group["params"][0]).is_matrix
    dtype = getattr(torch, PRECISIONS[train.precision].orthogonalizes_in)
    return Muon(groups, momentum=train.momentum, dtype=dtype, **_adamw_arguments(train))


def _groups(parameters: Iterable[nn.Parameter], train: Train, key: Callable[[Shard], object]) -> list[dict[str, Any]]:
    """Return the groups of parameters whose keys differ, in the order of the parameters."""
    by_key: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_key.setdefault(key(shard_of(parameter)), []).append(parameter)
    return [
        {"params": group, "weight_decay": train.weight_decay if shard_of(group[0]).decays else 0.0}
        for group in by_key.values()
    ]


def _adamw_arguments(train: Train) -> dict[str, Any]:
    return {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.epsilon, "fused": True}
