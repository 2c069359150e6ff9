"""The layers of the bloom family. A layer takes and returns [batch, seq, hidden]."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Model
from parallel.axes import Group
from parallel.layers import WordEmbedding, column_linear, layer_norm, mean_loss, row_linear
from parallel.plan import LayerPlan
from training.families.bloom import BLOOM
from training.families.description import Shards
from training.model.attention import Attention
from training.model.cache import KeyValueCache
from training.model.positions.method import PositionMethod


class EmbeddingNorm(nn.Module):
    """The layer after the word embedding: absolute positions if the method has them, LayerNorm, dropout."""

    def __init__(self, model: Model, shards: Shards, *, position: PositionMethod) -> None:
        super().__init__()
        self.position = position
        self.norm = layer_norm(shards, "embedding.norm", epsilon=BLOOM.norm_epsilon)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; a cache says how many tokens came before."""
        x = self.position.embed(x, start=cache.length if cache else 0)
        out: Tensor = self.dropout(self.norm(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(
        self,
        model: Model,
        shards: Shards,
        *,
        index: int,
        tensor: Group,
        position: PositionMethod,
        attend: Attention,
        recompute: bool,
    ) -> None:
        super().__init__()
        name, epsilon = f"blocks.{index}", BLOOM.norm_epsilon
        self.local_heads, self.head_dim = len(position.heads), model.head_dim
        self.index, self.position, self.attend, self.recompute = index, position, attend, recompute
        self.attention_norm = layer_norm(shards, f"{name}.attention_norm", epsilon=epsilon)
        self.query_key_value = column_linear(shards, f"{name}.attention.query_key_value", tensor=tensor)
        self.output = row_linear(shards, f"{name}.attention.output", tensor=tensor)
        self.feed_forward_norm = layer_norm(shards, f"{name}.feed_forward_norm", epsilon=epsilon)
        self.up = column_linear(shards, f"{name}.feed_forward.up", tensor=tensor)
        self.down = row_linear(shards, f"{name}.feed_forward.down", tensor=tensor)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; with a cache, x follows the tokens in it."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, cache, use_reentrant=False)
            return out
        return self._forward(x, cache)

    def _forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self._attention(self.attention_norm(x), cache))
        up, _ = self.up(self.feed_forward_norm(x))  # [batch, seq, inner / tensor]
        down, _ = self.down(F.gelu(up, approximate="tanh"))
        out: Tensor = x + self.dropout(down)
        return out

    def _attention(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        batch, seq, _ = x.shape
        # Columns in QKV_ORDER: [batch, seq, local_heads, 3, head_dim] -> 3 x [batch, local_heads, seq, head_dim].
        qkv = self.query_key_value(x)[0].view(batch, seq, self.local_heads, 3, self.head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q, k = self.position.rotate(q, k, start=cache.length if cache else 0)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        joined = self.attend(q, k, v).transpose(1, 2).reshape(batch, seq, self.local_heads * self.head_dim)
        out: Tensor = self.output(joined)[0]
        return out


class FinalNorm(nn.Module):
    """The LayerNorm before the head."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.norm = layer_norm(shards, "final_norm", epsilon=BLOOM.norm_epsilon)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; the cache is not used."""
        out: Tensor = self.norm(x)
        return out


def plan_bloom(
    model: Model, shards: Shards, *, tensor: Group, position: PositionMethod, attend: Attention, recompute: bool
) -> LayerPlan:
    """Return the layers of a bloom decoder, not yet built.

    Args:
        model: The decoder's shape.
        shards: The model's shards.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        position: The position method on this rank.
        attend: The attention of all blocks.
        recompute: Recompute each block in the backward pass.
    """

    def block(index: int) -> Block:
        return Block(model, shards, index=index, tensor=tensor, position=position, attend=attend, recompute=recompute)

    return LayerPlan(
        embedding=lambda: WordEmbedding(shards["embedding.word.weight"], tensor=tensor),
        head=WordEmbedding.logits,
        before=(lambda: EmbeddingNorm(model, shards, position=position),),
        blocks=tuple(partial(block, index) for index in range(model.layers)),
        after=(lambda: FinalNorm(shards),),
        loss=mean_loss,
        shared=position.module,
    )
