"""Tensor-parallel layers from megatron-core, with each parameter declared by its shard."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.layout import padded_vocabulary
from parallel.libraries import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_grad_accumulation_and_async_allreduce,
    vocab_parallel_cross_entropy,
)
from parallel.parameter import Rule, Shard
from parallel.shards import declare

# Megatron only allocates: parallel.seeds draws the initial weights.
_CONFIG = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)


def _unused(_: Tensor) -> None:
    """Stand in for the init method that megatron requires."""


def column_linear(shards: Mapping[str, Shard], name: str, *, tensor: Group) -> nn.Module:
    """Return a linear whose outputs are split: [batch, seq, inputs] -> ([batch, seq, outputs / tensor], None).

    Args:
        shards: The model's shards; `name`.weight and `name`.bias are this layer's.
        name: Logical name of the layer.
        tensor: The tensor axis.
    """
    outputs, inputs = _shape(shards[f"{name}.weight"], rule="column")
    layer: nn.Module = ColumnParallelLinear(
        inputs, outputs, config=_CONFIG, init_method=_unused, gather_output=False, tp_group=tensor.handle
    )
    return _declared(layer, shards, name)


def row_linear(shards: Mapping[str, Shard], name: str, *, tensor: Group) -> nn.Module:
    """Return a linear whose inputs are split: [batch, seq, inputs / tensor] -> ([batch, seq, outputs], None).

    Args:
        shards: The model's shards; `name`.weight and `name`.bias are this layer's.
        name: Logical name of the layer.
        tensor: The tensor axis; its ranks sum their parts of the output.
    """
    outputs, inputs = _shape(shards[f"{name}.weight"], rule="row")
    layer: nn.Module = RowParallelLinear(
        inputs,
        outputs,
        config=_CONFIG,
        init_method=_unused,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tensor.handle,
    )
    return _declared(layer, shards, name)


def layer_norm(shards: Mapping[str, Shard], name: str, *, epsilon: float) -> nn.LayerNorm:
    """Return a LayerNorm over [..., hidden], whole on every rank."""
    layer = nn.LayerNorm(_shape(shards[f"{name}.weight"], rule="replicated"), eps=epsilon)
    _declared(layer, shards, name)
    return layer


def _shape(shard: Shard, *, rule: Rule) -> tuple[int, ...]:
    """Return the whole shape of a layer's weight after checking that it is declared with the layer's split rule."""
    assert shard.rule == rule, f"{shard.name} is declared {shard.rule}, but its layer is {rule}"
    return shard.shape


def _declared(layer: nn.Module, shards: Mapping[str, Shard], name: str) -> nn.Module:
    for part in ("weight", "bias"):
        declare(layer.get_parameter(part), shards[f"{name}.{part}"])
    return layer


class WordEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """The word embedding, with rows split over the tensor ranks; also the head, which shares the weight.

    tokens [batch, seq] int64 -> [batch, seq, hidden].
    """

    def __init__(self, shard: Shard, *, tensor: Group) -> None:
        vocab_size, hidden = _shape(shard, rule="vocabulary")
        padded = padded_vocabulary(vocab_size, tensor=tensor.size)
        super().__init__(padded, hidden, init_method=_unused, config=_CONFIG, tp_group=tensor.handle)
        # F.embedding's gradient adds rows on a GPU in no fixed order; indexing has a deterministic gradient.
        self.deterministic_mode = torch.are_deterministic_algorithms_enabled()
        declare(self.weight, shard)
        # rows of real tokens on this rank; the rest is padding
        real = min(max(vocab_size - self.vocab_start_index, 0), self.num_embeddings_per_partition)
        self.padding = self.num_embeddings_per_partition - real

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits: [batch, seq, hidden] -> [batch, seq, local_vocab], padding at -inf."""
        logits: Tensor = linear_with_grad_accumulation_and_async_allreduce(
            input=x,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.tp_group.size() > 1,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        if self.padding:
            # A padding row is not a token: if it took any probability, the loss would depend on the layout.
            columns = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(columns >= logits.shape[-1] - self.padding, -torch.inf)
        return logits


def split_cross_entropy(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token without gathering logits.

    Overwrites fp32 logits: megatron subtracts the largest one in place.

    Args:
        local_logits: This rank's columns, [batch, seq, local_vocab].
        targets: Token ids, [batch, seq] int64.
    Returns:
        Negative log-likelihood in nats, [batch, seq] fp32.
    """
    losses: Any = vocab_parallel_cross_entropy(local_logits.contiguous(), targets.contiguous())
    return losses  # type: ignore[no-any-return]


def mean_loss(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a micro-batch over all targets; shapes as for `split_cross_entropy`."""
    return split_cross_entropy(local_logits, targets).mean()
