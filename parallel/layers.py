"""Tensor-parallel layers from megatron-core, with each parameter declared by its shard.

States are [seq, batch, hidden]. If the sequence is split, a rank holds [seq / tensor, batch, hidden] of them between
the linears: column linears gather the parts, row linears and the word embedding scatter their sums.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.fused import add_and_normalize, add_to_residual, normalize, split_heads, swiglu
from parallel.gate import gated
from parallel.head import Compile, as_it_is
from parallel.heads import view_heads
from parallel.layout import padded_vocabulary
from parallel.libraries import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
)
from parallel.parameter import Rule, Shard
from parallel.sequence import with_summed_gradients
from parallel.shards import declare

_Layer = TypeVar("_Layer", bound=nn.Module)
_Norm = TypeVar("_Norm", bound="Norm")


def _unused(_: Tensor) -> None:
    """Stand in for the init method that megatron requires."""


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A linear whose outputs are split: states -> [seq, batch, outputs / tensor] and a bias that is still to add."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        tensor: Group,
        config: ModelParallelConfig,
        bias: bool,
        adds_bias: bool,
        paired: bool = False,
    ) -> None:
        outputs, inputs = shape
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_unused,
            bias=bias,
            skip_bias_add=True,
            disable_grad_reduce=paired,
            tp_group=tensor.handle,
        )
        self._adds_bias = bias and adds_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output with its bias and None, or without it and the bias."""
        out, bias = super().forward(x)
        # The output is new and not kept for the backward pass.
        return (out.add_(bias), None) if self._adds_bias else (out, bias)


class ColumnPair(nn.Module):
    """Two linears of the same states, whose outputs are split.

    States are gathered, and their gradients summed over the tensor ranks, once for both. Where the sequence is split,
    the gathered states are kept for the backward pass, not gathered again.
    """

    def __init__(self, first: ColumnLinear, second: ColumnLinear, *, tensor: Group, sequence: bool) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._tensor, self._sequence = tensor, sequence

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return each linear's output and its bias, as `ColumnLinear` does."""
        if self._sequence:
            x = gather_from_sequence_parallel_region(x, group=self._tensor.handle)
        elif self._tensor.size > 1:
            x = copy_to_tensor_model_parallel_region(x, group=self._tensor.handle)
        return *self.first(x), *self.second(x)


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """A linear whose inputs are split: [seq, batch, inputs / tensor] -> states, and a bias that is still to add."""

    def __init__(self, shape: tuple[int, ...], *, tensor: Group, config: ModelParallelConfig, bias: bool) -> None:
        outputs, inputs = shape
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_unused,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tensor.handle,
        )
        self._tensor = tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output without its bias, and the bias."""
        out, bias = super().forward(x)
        if self.sequence_parallel and bias is not None:
            (bias,) = with_summed_gradients(bias, tensor=self._tensor)
        return out, bias


class Norm(nn.LayerNorm):
    """A LayerNorm of states, whole on every rank."""

    def __init__(
        self, shape: tuple[int, ...], *, epsilon: float, bias: bool, split: Group | None, compiled: Compile
    ) -> None:
        super().__init__(shape, eps=epsilon, bias=bias)
        self._split, self._normalize = split, compiled(normalize)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states' LayerNorm."""
        out: Tensor = self._normalize(_rows(x), *self._parameters_here(), self.eps)
        return out.view(x.shape)

    def _parameters_here(self) -> tuple[Tensor, Tensor | None]:
        if self._split is None:
            return self.weight, self.bias
        summed = with_summed_gradients(*self.parameters(), tensor=self._split)
        return summed[0], summed[1] if len(summed) > 1 else None


class ResidualNorm(Norm):
    """The same, of states that are used further, after a linear's output is added to them."""

    def __init__(
        self, shape: tuple[int, ...], *, epsilon: float, bias: bool, split: Group | None, compiled: Compile
    ) -> None:
        super().__init__(shape, epsilon=epsilon, bias=bias, split=split, compiled=compiled)
        self._add_and_normalize = compiled(add_and_normalize)

    def forward(  # type: ignore[override]
        self, x: Tensor, output: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of states, a linear's output and its bias, as far as there are any, and its LayerNorm."""
        output = None if output is None else _rows(output)
        rows = self._add_and_normalize(_rows(x), output, bias, *self._parameters_here(), self.eps)
        added, normalized = rows
        return added.view(x.shape), normalized.view(x.shape)


def _config(tensor: Group, *, sequence: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        use_cpu_initialization=True,
        perform_initialization=False,  # megatron only allocates: parallel.seeds draws the initial weights
        tensor_model_parallel_size=tensor.size,
        sequence_parallel=sequence,
    )


def _let_megatron_split() -> None:
    """Give megatron-core what its split sequences need: a shared buffer, and a device where there is no CUDA."""
    if not torch.cuda.is_available():
        # It allocates on the current CUDA device, whatever its inputs are on.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _rows(x: Tensor) -> Tensor:
    """Return [..., hidden] as [tokens, hidden]: compiled functions then serve any batch and length."""
    return x.reshape(-1, x.shape[-1])


class Layers:
    """Builds the layers of one rank from the model's shards."""

    def __init__(
        self,
        shards: Mapping[str, Shard],
        *,
        tensor: Group,
        activation: Callable[..., Tensor],
        sequence: bool = False,
        compiled: Compile = as_it_is,
    ) -> None:
        """Set what all of them share.

        Args:
            shards: The model's shards; `name`.weight and, if there is one, `name`.bias are the layer's of that name.
            tensor: The tensor axis.
            activation: The feed-forward's, of `parallel.fused`.
            sequence: Whether the sequence is split between the linears.
            compiled: Compiles a function of tensors.
        """
        self._shards, self._tensor, self._compiled = shards, tensor, compiled
        self._split = tensor if sequence and tensor.size > 1 else None
        if self._split is not None:
            _let_megatron_split()
        self._config = _config(tensor, sequence=self._split is not None)
        keeps_little = compiled is as_it_is and activation is swiglu
        self._activate: Callable[..., Tensor] = gated if keeps_little else compiled(activation)
        self._add_to_residual, self._split_heads = compiled(add_to_residual), compiled(split_heads)

    def column_linear(self, name: str) -> ColumnLinear:
        """Return the linear of a name, whose outputs are split; a compiled function that follows adds its bias."""
        return self._column_linear(name, self._config, paired=False)

    def column_pair(self, first: str, second: str) -> ColumnPair:
        """Return the linears of two names, which take the same states; see `column_linear`."""
        config = _config(self._tensor, sequence=False)
        linears = (self._column_linear(name, config, paired=True) for name in (first, second))
        return ColumnPair(*linears, tensor=self._tensor, sequence=self._split is not None)

    def row_linear(self, name: str) -> RowLinear:
        """Return the linear of a name, whose inputs are split."""
        shape, bias = self._shape(name, rule="row"), self._has_bias(name)
        return self._declared(RowLinear(shape, tensor=self._tensor, config=self._config, bias=bias), name)

    def norm(self, name: str, *, epsilon: float) -> Norm:
        """Return the LayerNorm of a name."""
        return self._norm(Norm, name, epsilon=epsilon)

    def residual_norm(self, name: str, *, epsilon: float) -> ResidualNorm:
        """Return the LayerNorm of a name, of states that are used further."""
        return self._norm(ResidualNorm, name, epsilon=epsilon)

    def split_heads(self, qkv: Tensor, bias: Tensor | None, *, heads: int) -> tuple[Tensor, ...]:
        """Return queries, keys and values of the projection's output and its bias.

        Compiled, each is written in one piece, with its bias; otherwise they are views.

        Args:
            qkv: [seq, batch, local_heads * 3 * head_dim].
            bias: None if it is added already.
            heads: Heads of this tensor rank.
        Returns:
            Three tensors [batch, local_heads, seq, head_dim].
        """
        if self._compiled is as_it_is:
            return view_heads(qkv, heads=heads)
        parts = self._split_heads(_rows(qkv), bias, heads)
        return tuple(part.view(*qkv.shape[:2], heads, -1).permute(1, 2, 0, 3) for part in parts)

    def activate(self, up: Tensor, bias: Tensor | None, *second: Tensor | None) -> Tensor:
        """Return the activation of a linear's output and its bias, or of a pair's, [..., inner / tensor] each."""
        rows = (x if x is None or x.ndim == 1 else _rows(x) for x in second)
        out: Tensor = self._activate(_rows(up), bias, *rows)
        return out.view(up.shape)

    def add_to_residual(self, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        """Return states plus a linear's output and its bias."""
        out: Tensor = self._add_to_residual(_rows(x), _rows(output), bias)
        return out.view(x.shape)

    def start_of(self, x: Tensor) -> int:
        """Return the place in the sequence of the first token of this rank's states."""
        return 0 if self._split is None else self._split.rank * x.shape[0]

    def _shape(self, name: str, *, rule: Rule) -> tuple[int, ...]:
        return _shape(self._shards[f"{name}.weight"], rule=rule)

    def _has_bias(self, name: str) -> bool:
        return f"{name}.bias" in self._shards

    def _column_linear(self, name: str, config: ModelParallelConfig, *, paired: bool) -> ColumnLinear:
        shape, bias, adds = self._shape(name, rule="column"), self._has_bias(name), self._compiled is as_it_is
        linear = ColumnLinear(shape, tensor=self._tensor, config=config, bias=bias, adds_bias=adds, paired=paired)
        return self._declared(linear, name)

    def _norm(self, kind: type[_Norm], name: str, *, epsilon: float) -> _Norm:
        shape, bias = self._shape(name, rule="replicated"), self._has_bias(name)
        norm = kind(shape, epsilon=epsilon, bias=bias, split=self._split, compiled=self._compiled)
        return self._declared(norm, name)

    def _declared(self, layer: _Layer, name: str) -> _Layer:
        for part, parameter in layer.named_parameters():
            declare(parameter, self._shards[f"{name}.{part}"])
        return layer


def _shape(shard: Shard, *, rule: Rule) -> tuple[int, ...]:
    """Return the whole shape of a layer's weight after checking that it is declared with the layer's split rule."""
    assert shard.rule == rule, f"{shard.name} is declared {shard.rule}, but its layer is {rule}"
    return shard.shape


class WordEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """The word embedding, with rows split over the tensor ranks; the head shares the weight.

    tokens [batch, seq] int64 -> states.
    """

    def __init__(self, shard: Shard, *, tensor: Group, sequence: bool = False) -> None:
        vocab_size, hidden = _shape(shard, rule="vocabulary")
        padded = padded_vocabulary(vocab_size, tensor=tensor.size)
        split = sequence and tensor.size > 1
        super().__init__(
            padded,
            hidden,
            init_method=_unused,
            reduce_scatter_embeddings=split,
            config=_config(tensor, sequence=split),
            tp_group=tensor.handle,
        )
        # F.embedding's gradient adds rows on a GPU in no fixed order; indexing has a deterministic gradient.
        self.deterministic_mode = torch.are_deterministic_algorithms_enabled()
        declare(self.weight, shard)
        # rows of real tokens on this rank; the rest is padding
        real = min(max(vocab_size - self.vocab_start_index, 0), self.num_embeddings_per_partition)
        self.padding = self.num_embeddings_per_partition - real

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the states of tokens [batch, seq]."""
        # megatron exchanges the first two dimensions itself where it scatters. Contiguous: an index's states lie as it
        # does, and megatron sums a copy of what is not contiguous, and drops it.
        out: Tensor = super().forward(tokens if self.reduce_scatter_embeddings else tokens.t().contiguous())
        return out


class HeadWeight(WordEmbedding):
    """A weight of the head's own, split like the word embedding: a layer that passes states on to the head."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the states."""
        return x
