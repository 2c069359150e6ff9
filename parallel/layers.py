"""The split layers: megatron-core's, each parameter declared with its name, whole shape and rule."""

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
from parallel.parameter import Shard
from parallel.shards import declare

# Initial weights come from parallel.seeds, drawn whole on the CPU; megatron only allocates.
_CONFIG = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)


def _unused(_: Tensor) -> None:
    """Stand where megatron wants an init method."""


def column_linear(name: str, *, inputs: int, outputs: int, init_std: float, tensor: Group) -> nn.Module:
    """Return a linear whose outputs are split: [batch, seq, inputs] -> ([batch, seq, outputs / tensor], None)."""
    layer: nn.Module = ColumnParallelLinear(
        inputs, outputs, config=_CONFIG, init_method=_unused, gather_output=False, tp_group=tensor.handle
    )
    _declare_linear(
        layer,
        Shard(f"{name}.weight", (outputs, inputs), "column", init_std),
        Shard(f"{name}.bias", (outputs,), "column"),
    )
    return layer


def row_linear(name: str, *, inputs: int, outputs: int, init_std: float, tensor: Group) -> nn.Module:
    """Return a linear whose inputs are split: [batch, seq, inputs / tensor] -> ([batch, seq, outputs], None)."""
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
    _declare_linear(
        layer,
        Shard(f"{name}.weight", (outputs, inputs), "row", init_std),
        Shard(f"{name}.bias", (outputs,), "replicated"),
    )
    return layer


def _declare_linear(layer: nn.Module, weight: Shard, bias: Shard) -> None:
    declare(layer.get_parameter("weight"), weight)
    declare(layer.get_parameter("bias"), bias)


def layer_norm(name: str, *, hidden: int) -> nn.LayerNorm:
    """Return a LayerNorm over [..., hidden], whole on every rank."""
    layer = nn.LayerNorm(hidden, eps=1e-5)
    declare(layer.weight, Shard(f"{name}.weight", (hidden,), "replicated", constant=1.0))
    declare(layer.bias, Shard(f"{name}.bias", (hidden,), "replicated"))
    return layer


class WordEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Token vectors, rows split over the tensor ranks; also the head, which shares the weight.

    tokens [batch, seq] int64 -> [batch, seq, hidden].
    """

    def __init__(self, *, vocab_size: int, hidden: int, init_std: float, tensor: Group) -> None:
        padded = padded_vocabulary(vocab_size, tensor=tensor.size)
        super().__init__(padded, hidden, init_method=_unused, config=_CONFIG, tp_group=tensor.handle)
        declare(self.weight, Shard("embedding.word.weight", (vocab_size, hidden), "vocabulary", init_std, tied=True))
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
            # A padded row is no token: it must take no probability, or the loss would depend on the layout.
            columns = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(columns >= logits.shape[-1] - self.padding, -torch.inf)
        return logits


def split_cross_entropy(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token without gathering logits. Overwrites fp32 logits: megatron shifts them in place.

    Args:
        local_logits: This rank's columns, [batch, seq, local_vocab].
        targets: Token ids, [batch, seq] int64.
    Returns:
        Negative log-likelihood in nats, [batch, seq] fp32.
    """
    losses: Any = vocab_parallel_cross_entropy(local_logits.contiguous(), targets.contiguous())
    return losses  # type: ignore[no-any-return]
