"""Bloom, Mpt and Jais in plain tensor arithmetic from logical weights: no transformers, no code of the project.

The weights tell the family: Mpt has no norm after the embedding, no biases, and an exact GELU; Jais has a gate.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

Hook = Callable[[torch.Tensor], torch.Tensor]
_INTO = ("up", "gate")  # a feed-forward


def bloom_logits(
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    *,
    layers: int,
    heads: int,
    bias_max: int = 8,
    penalty: torch.Tensor | None = None,
    embedded: Hook | None = None,
    turned: Hook | None = None,
) -> torch.Tensor:
    """Return logits, [batch, seq, vocab], in the weights' type, of tokens [batch, seq].

    Args:
        weights: Weights by logical name.
        tokens: Token ids.
        layers: Number of blocks.
        heads: Heads per block.
        bias_max: ALiBi's flattest slope is 2^-bias_max, for a power of two of heads.
        penalty: Bias to add to the scores, [heads, seq, seq]; ALiBi's by default.
        embedded: Function to apply to the embeddings, [batch, seq, hidden].
        turned: Function to apply to queries and to keys, [batch, heads, seq, head_dim].
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), eps=1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    batch, seq = tokens.shape
    distance = torch.arange(seq)[None, :] - torch.arange(seq)[:, None]
    bias = _slopes(heads, bias_max=bias_max)[:, None, None] * distance if penalty is None else penalty
    bias = bias.masked_fill(distance > 0, -math.inf).to(weights["embedding.word.weight"].dtype)
    x = weights["embedding.word.weight"][tokens]
    x, is_bloom = x if embedded is None else embedded(x), "embedding.norm.weight" in weights
    x = norm(x, "embedding.norm") if is_bloom else x
    for block in range(layers):
        prefix = f"blocks.{block}"
        mixed = linear(norm(x, f"{prefix}.attention_norm"), f"{prefix}.attention.query_key_value")
        query, key, value = mixed.view(batch, seq, heads, 3, -1).permute(3, 0, 2, 1, 4)
        query, key = (query, key) if turned is None else (turned(query), turned(key))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, seq, -1)
        x = x + linear(attended, f"{prefix}.attention.output")
        normal, names = norm(x, f"{prefix}.feed_forward_norm"), (f"{prefix}.feed_forward.{part}" for part in _INTO)
        up, gate = (linear(normal, name) if f"{name}.weight" in weights else None for name in names)
        x = x + linear(_activated(up, gate, tanh=is_bloom), f"{prefix}.feed_forward.down")
    return norm(x, "final_norm") @ weights.get("head.weight", weights["embedding.word.weight"]).T


def _activated(up: torch.Tensor | None, gate: torch.Tensor | None, *, tanh: bool) -> torch.Tensor:
    assert up is not None
    if gate is None:
        return functional.gelu(up, approximate="tanh" if tanh else "none")
    return gate / (1 + torch.exp(-gate)) * up


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats of logits [batch, seq, vocab] and targets [batch, seq], in the logits' type."""
    largest = logits.max(-1, keepdim=True).values.detach()
    total = (logits - largest).exp().sum(-1, keepdim=True).log() + largest
    return (total - logits.gather(-1, targets[..., None])).mean()


def _slopes(heads: int, *, bias_max: int = 8) -> torch.Tensor:
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-bias_max * (n + 1) / power) for n in range(power)]
    between = [2 ** (-bias_max / 2 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(first + between, dtype=torch.float64)
