"""The decoder as a list of layers, the same list for one process and for pipeline stages.

Bloom's design: word embedding and its LayerNorm, pre-norm blocks with biases and tanh GELU, a last
LayerNorm, a head that shares the embedding. A layer takes and returns [batch, seq, hidden].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.backends import backend_of
from configs.schema import Model
from parallel.axes import Group
from parallel.layers import WordEmbedding, column_linear, layer_norm, row_linear, split_cross_entropy
from parallel.plan import LayerPlan
from training.model.alibi import local_slopes
from training.model.attention import MAKERS, Attention
from training.model.bias import Bias, SlopeBias, power_of_two
from training.model.cache import KeyValueCache
from training.model.rotary import rotate
from training.model.sinusoidal import sinusoids
from training.model.t5 import LearnedBias


class EmbeddingNorm(nn.Module):
    """What follows the word embedding: absolute positions where the model has them, LayerNorm, dropout."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.sinusoidal = model.position == "sinusoidal"
        self.norm = layer_norm("embedding.norm", hidden=model.hidden)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; a cache says how many tokens came before."""
        if self.sinusoidal:
            start = cache.length if cache else 0
            end = start + x.shape[1]
            table = sinusoids(power_of_two(end), hidden=x.shape[2], device=x.device)[start:end]
            # Scaled as in the source: else unit-sized sines would drown the small initial embeddings.
            x = x * x.shape[2] ** 0.5 + table.to(x.dtype)
        out: Tensor = self.dropout(self.norm(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, model: Model, *, index: int, tensor: Group, attend: Attention, recompute: bool) -> None:
        super().__init__()
        name, hidden, std = f"blocks.{index}", model.hidden, model.init_std
        out_std = std / (2 * model.layers) ** 0.5  # keeps the residual stream's variance independent of depth
        self.local_heads, self.head_dim = model.heads // tensor.size, model.head_dim
        self.index, self.attend, self.recompute = index, attend, recompute
        self.rotary = model.position == "rotary"
        self.attention_norm = layer_norm(f"{name}.attention_norm", hidden=hidden)
        self.query_key_value = column_linear(
            f"{name}.attention.query_key_value", inputs=hidden, outputs=3 * hidden, init_std=std, tensor=tensor
        )
        self.output = row_linear(
            f"{name}.attention.output", inputs=hidden, outputs=hidden, init_std=out_std, tensor=tensor
        )
        self.feed_forward_norm = layer_norm(f"{name}.feed_forward_norm", hidden=hidden)
        self.up = column_linear(
            f"{name}.feed_forward.up", inputs=hidden, outputs=model.inner, init_std=std, tensor=tensor
        )
        self.down = row_linear(
            f"{name}.feed_forward.down", inputs=model.inner, outputs=hidden, init_std=out_std, tensor=tensor
        )
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; with a cache, of tokens that follow those in it."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, cache, use_reentrant=False)
            return out
        return self._forward(x, cache)

    def _forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self._attention(self.attention_norm(x), cache))
        up, _ = self.up(self.feed_forward_norm(x))
        down, _ = self.down(F.gelu(up, approximate="tanh"))
        out: Tensor = x + self.dropout(down)
        return out

    def _attention(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        batch, seq, _ = x.shape
        # The columns are [local_heads][q, k, v][head_dim], so that a tensor rank's slice is whole heads.
        qkv = self.query_key_value(x)[0].view(batch, seq, self.local_heads, 3, self.head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        if self.rotary:
            start = cache.length if cache else 0
            q, k = rotate(q, start=start), rotate(k, start=start)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        joined = self.attend(q, k, v).transpose(1, 2).reshape(batch, seq, self.local_heads * self.head_dim)
        out: Tensor = self.output(joined)[0]
        return out


class FinalNorm(nn.Module):
    """The LayerNorm before the head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.norm = layer_norm("final_norm", hidden=model.hidden)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, hidden] -> [batch, seq, hidden]; a norm needs no token before."""
        out: Tensor = self.norm(x)
        return out


def plan_layers(model: Model, *, vocab_size: int, tensor: Group, recompute: bool) -> LayerPlan:
    """Return the layers of a decoder, not yet built: a pipeline stage builds only its own.

    Args:
        model: The decoder's shape.
        vocab_size: Tokens, without padding.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        recompute: Recompute each block in the backward pass.
    """
    bias = _bias_of(model, tensor=tensor)
    attend = MAKERS[backend_of(model.attention).name](bias)

    def block(index: int) -> Block:
        return Block(model, index=index, tensor=tensor, attend=attend, recompute=recompute)

    return LayerPlan(
        embedding=lambda: WordEmbedding(
            vocab_size=vocab_size, hidden=model.hidden, init_std=model.init_std, tensor=tensor
        ),
        head=WordEmbedding.logits,
        before=(lambda: EmbeddingNorm(model),),
        blocks=tuple(lambda index=index: block(index) for index in range(model.layers)),  # type: ignore[misc]
        after=(lambda: FinalNorm(model),),
        loss=mean_loss,
        shared=bias if isinstance(bias, LearnedBias) else None,
    )


def mean_loss(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a micro-batch, every target counted."""
    return split_cross_entropy(local_logits, targets).mean()


def _bias_of(model: Model, *, tensor: Group) -> Bias:
    if model.position == "alibi":
        return SlopeBias(local_slopes(model.heads, tensor=tensor))
    if model.position == "t5":
        return LearnedBias(model.heads, init_std=model.init_std, tensor=tensor)
    return SlopeBias(None)


class Decoder(nn.Module):
    """All layers of a plan in one module, for the engine without a pipeline and for one process."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.embedding = plan.embedding()
        self.head = plan.head
        self.layers = nn.ModuleList(make() for make in (*plan.before, *plan.blocks, *plan.after))
        self.shared = plan.shared

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the states before the head: [batch, seq] -> [batch, seq, hidden].

        With a cache the tokens follow those in it, and are in it afterwards.
        """
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Return this rank's logits: [batch, seq] -> [batch, seq, local_vocab]."""
        return self.logits(self.hidden(tokens))

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits of states [..., hidden]: [..., local_vocab]."""
        return self.head(self.embedding, x)
