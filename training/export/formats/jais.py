"""Jais in plain tensor arithmetic, from a GGUF file or a Hugging Face folder: transformers has no class for it.

Source: Sengupta et al., "Jais and Jais-chat", 2023, sections 3.1 and 3.2, the second for muP's scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.positions import slopes
from configs.schema import Model
from training.export.formats.gguf_weights import gguf_weights
from training.export.hf_model import RunningScales
from training.families.jais import JAIS


@dataclass(frozen=True)
class JaisShape:
    """What Jais's weights do not say.

    Attributes:
        layers, heads: Blocks, and heads of each.
        bias_max: ALiBi's flattest slope is 2^-bias_max, for a power of two of heads.
        scales: What it multiplies by when it runs.
        transposes: Whether a block's matrices are [inputs, outputs].
    """

    layers: int
    heads: int
    bias_max: float
    scales: RunningScales
    transposes: bool = False


class JaisModel:
    """Implement `ExportedModel`; its memory grows with the square of the length, and it has no cache."""

    def __init__(self, weights: Mapping[str, Tensor], shape: JaisShape) -> None:
        """Take fp32 weights by the names of JAISLMHeadModel, each read when it is used, and the shape."""
        self._weights, self._shape = weights, shape

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens, [1, seq] int64, as [1, seq, vocab] fp32."""
        shape, (batch, seq) = self._shape, tokens.shape
        places = torch.arange(seq)
        distance = (places[:, None] - places).float()
        bias = torch.tensor(slopes(shape.heads, bias_max=shape.bias_max))[:, None, None] * -distance
        bias.masked_fill_(distance < 0, -inf)
        word = self._weights["transformer.wte.weight"]
        x = word[tokens] * shape.scales.embedding
        for block in range(shape.layers):
            at = f"transformer.h.{block}"
            qkv = self._linear(self._norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
            q, k, v = qkv.view(batch, seq, 3, shape.heads, -1).permute(2, 0, 3, 1, 4)
            scale = q.shape[-1] ** (-1.0 if shape.scales.divides_by_width else -0.5)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            x = x + self._linear(attended.transpose(1, 2).reshape(batch, seq, -1), f"{at}.attn.c_proj")
            normal = self._norm(x, f"{at}.ln_2")
            wide = F.silu(self._linear(normal, f"{at}.mlp.c_fc2")) * self._linear(normal, f"{at}.mlp.c_fc")
            x = x + self._linear(wide, f"{at}.mlp.c_proj")
        x = self._norm(x, "transformer.ln_f")
        head = self._weights["lm_head.weight"] if "lm_head.weight" in self._weights else word
        return F.linear(x, head).mul_(shape.scales.logits)

    def continue_greedily(self, ids: Sequence[int], *, tokens: int, end: int) -> list[int]:
        """Return the ids of at most `tokens` new tokens; see `ExportedModel`."""
        new: list[int] = []
        while len(new) < tokens and end not in new:
            new.append(int(self(torch.tensor([[*ids, *new]]))[0, -1].argmax()))
        return new

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        return F.linear(x, weight.t() if self._shape.transposes else weight, self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, JAIS.norm_epsilon)


def load_jais(file: Path) -> JaisModel:
    """Return a GGUF file's model in fp32.

    Raises:
        TrainshortError: the file lacks a weight, or has one that the model does not know.
    """
    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[f"jais.{name}"].contents()

    layers, heads = field("block_count"), field("attention.head_count")
    model = Model(layers=layers, hidden=field("embedding_length"), heads=heads, family=JAIS.name, tie_embeddings=False)
    weights = dict(gguf_weights(reader, model, vocab_size=field("vocab_size")))
    scales = RunningScales(divides_by_width=True)
    return JaisModel(weights, JaisShape(layers, heads, field("attention.max_alibi_bias"), scales))
