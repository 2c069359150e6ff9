"""The optimizers. `configs.choices` has a row for each, with the state that it keeps."""

from collections.abc import Iterable

import torch
from torch import nn

from configs.schema import Train
from parallel.shards import shard_of


def adamw(parameters: Iterable[nn.Parameter], *, train: Train) -> torch.optim.Optimizer:
    """Return AdamW over two groups: the parameters that are declared to decay, and the others.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if shard_of(p).decays], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not shard_of(p).decays], "weight_decay": 0.0},
    ]
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)
