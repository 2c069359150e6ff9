"""The layers of families with a norm before attention and before the feed-forward.

A layer takes and returns states [seq, batch, hidden]. If the sequence is split between the linears, states are
[seq / tensor, batch, hidden].
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.backends import keeps_only_states
from configs.choices import FAMILIES
from configs.schema import Model
from parallel.axes import Group
from parallel.fused import ACTIVATIONS
from parallel.head import Compile, Head
from parallel.layers import HeadWeight, Layers, WordEmbedding
from parallel.plan import LayerPlan, Recompute
from training.families.description import Family, Shards
from training.model.attention import Attention
from training.model.blocks.selective import directly, feed, recomputed
from training.model.cache import Cache
from training.model.positions.method import PositionMethod


class Embedded(nn.Module):
    """The layer after the word embedding: absolute positions if the method has them, the family's norm, dropout."""

    def __init__(self, model: Model, layers: Layers, *, family: Family, position: PositionMethod) -> None:
        super().__init__()
        self.layers, self.position = layers, position
        norm = layers.norm("embedding.norm", epsilon=family.norm_epsilon) if family.embedding_norm else nn.Identity()
        self.norm = norm
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Return states -> states; a cache says how many tokens came before, documents where they begin."""
        first = self.layers.start_of(x)
        x = self.position.embed(x, start=cache.places(first, len(x)) if cache else first)
        out: Tensor = self.dropout(self.norm(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(
        self,
        model: Model,
        layers: Layers,
        *,
        family: Family,
        index: int,
        position: PositionMethod,
        attend: Attention,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        name, epsilon = f"blocks.{index}", family.norm_epsilon
        self.local_heads, self.index = len(position.heads), index
        self.position, self.attend, self.layers, self.recompute = position, attend, layers, recompute
        # To compute attention again would cost far more than what it keeps is worth.
        self._keeps_attention = keeps_only_states(model.attention, position=model.position, head_dim=model.head_dim)
        self.attention_norm = layers.residual_norm(f"{name}.attention_norm", epsilon=epsilon)
        self.query_key_value = layers.column_linear(f"{name}.attention.query_key_value")
        self.output = layers.row_linear(f"{name}.attention.output")
        self.feed_forward_norm = layers.residual_norm(f"{name}.feed_forward_norm", epsilon=epsilon)
        up = f"{name}.feed_forward.up"
        self.up = layers.column_pair(f"{name}.feed_forward.gate", up) if family.gated else layers.column_linear(up)
        self.down = layers.row_linear(f"{name}.feed_forward.down")
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, last: int | None = None) -> Tensor:
        """Return states -> states, with `last` those of the last places; with a cache, they follow the tokens in it."""
        if self.recompute is True and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, cache, last, use_reentrant=False)
            return out
        return self._forward(x, cache, last)

    def _forward(self, x: Tensor, cache: Cache | None, last: int | None) -> Tensor:
        run: Any = directly  # between the linears
        into: Any = directly  # a linear
        if self.recompute == "selective" and torch.is_grad_enabled():
            run, into = recomputed, feed
        x, normalized = run(self.attention_norm, x)
        qkv = into(self.query_key_value, normalized)
        around, after = (directly, directly) if self._keeps_attention else (run, into)
        attended = around(self._attention, *qkv, cache)  # [seq, batch, hidden / tensor]
        if last is not None:  # the places before are read as keys and values, and by nothing else
            x, attended = x[-last:], attended[-last:]
        output = self._drop(*after(self.output, attended))
        x, normalized = run(self.feed_forward_norm, x, *output)
        up = into(self.up, normalized)  # [seq, batch, inner / tensor], with a gate two of them
        down = self._drop(*into(self.down, run(self.layers.activate, *up)))
        return self.layers.add_to_residual(x, *down)

    def _attention(self, qkv: Tensor, bias: Tensor | None, cache: Cache | None) -> Tensor:
        seq, batch, _ = qkv.shape
        q, k, v = self.layers.split_heads(qkv, bias, heads=self.local_heads)  # [batch, local_heads, seq, head_dim] each
        q, k = self.position.rotate(q, k, start=cache.start if cache else 0)
        attended = self.attend(q, k, v) if cache is None else cache.attend(self.attend, self.index, q, k, v)
        return attended.permute(2, 0, 1, 3).reshape(seq, batch, -1)

    def _drop(self, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a linear's output and its bias, added up where dropout comes between them and the residual stream."""
        if not (self.training and self.dropout.p):
            return output, bias
        return self.dropout(output if bias is None else output + bias), None


class FinalNorm(nn.Module):
    """The LayerNorm before the head."""

    def __init__(self, layers: Layers, *, family: Family) -> None:
        super().__init__()
        self.norm = layers.norm("final_norm", epsilon=family.norm_epsilon)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Return states -> states; the cache is not used."""
        out: Tensor = self.norm(x)
        return out


def plan_prenorm(
    model: Model,
    shards: Shards,
    *,
    tensor: Group,
    position: PositionMethod,
    attend: Attention,
    recompute: Recompute,
    sequence: bool,
    z_loss: float,
    compiled: Compile,
) -> LayerPlan:
    """Return the layers of a decoder, not yet built.

    Args:
        model: The decoder's shape.
        shards: The model's shards.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        position: The position method on this rank.
        attend: The attention of all blocks.
        recompute: What each block recomputes in the backward pass.
        sequence: Whether the sequence is split between the linears.
        z_loss: See `Head`.
        compiled: Compiles a function of tensors.
    """
    family: Family = FAMILIES[model.family].load()
    activation = ACTIVATIONS[family.activation]
    layers = Layers(shards, tensor=tensor, activation=activation, sequence=sequence, compiled=compiled)
    head_weight = None if model.tie_embeddings else partial(HeadWeight, shards["head.weight"], tensor=tensor)

    def block(index: int) -> Block:
        return Block(model, layers, family=family, index=index, position=position, attend=attend, recompute=recompute)

    return LayerPlan(
        embedding=partial(WordEmbedding, shards["embedding.word.weight"], tensor=tensor, sequence=sequence),
        head=Head(tensor=tensor, sequence=sequence, z_loss=z_loss, compiled=compiled),
        before=(lambda: Embedded(model, layers, family=family, position=position),),
        blocks=tuple(partial(block, index) for index in range(model.layers)),
        after=(lambda: FinalNorm(layers, family=family),),
        head_weight=head_weight,
        shared=position.module,
    )
