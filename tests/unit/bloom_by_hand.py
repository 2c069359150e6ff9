"""The Bloom decoder in plain tensor arithmetic from logical weights: no transformers, no code of the project."""

import math

import torch
from torch.nn import functional


def bloom_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, *, layers: int, heads: int) -> torch.Tensor:
    """Return logits, [batch, seq, vocab], fp32, of tokens [batch, seq]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    batch, seq = tokens.shape
    places = torch.arange(seq)
    distance = (places[None, :] - places[:, None]).float()
    bias = _slopes(heads)[:, None, None] * distance
    bias = bias.masked_fill(distance > 0, -math.inf)
    x = norm(weights["embedding.word.weight"][tokens], "embedding.norm")
    for block in range(layers):
        prefix = f"blocks.{block}"
        mixed = linear(norm(x, f"{prefix}.attention_norm"), f"{prefix}.attention.query_key_value")
        query, key, value = mixed.view(batch, seq, heads, 3, -1).permute(3, 0, 2, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, seq, -1)
        x = x + linear(attended, f"{prefix}.attention.output")
        up = linear(norm(x, f"{prefix}.feed_forward_norm"), f"{prefix}.feed_forward.up")
        x = x + linear(functional.gelu(up, approximate="tanh"), f"{prefix}.feed_forward.down")
    return norm(x, "final_norm") @ weights["embedding.word.weight"].T


def _slopes(heads: int) -> torch.Tensor:
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    between = [2 ** (-4 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(first + between)
