"""Attention by torch's FlexAttention, compiled on a GPU; the bias is computed inside the kernel."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from training.model.kernels.slopes import DeviceSlopes
from training.model.positions.bias import Bias


class Flex:
    """FlexAttention with the slopes captured by its score function."""

    def __init__(self, bias: Bias) -> None:
        self.bias, self._slopes = bias, DeviceSlopes(bias)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        queries, keys = q.shape[2], k.shape[2]
        here = self._slopes.on(q.device)

        def penalized(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # With a cache, the first query is not at position 0.
            return score if here is None else score - here[head] * (query + (keys - queries) - key)

        flex_attention, mask = _flex_kernel(q.device.type), _flex_mask(queries, keys, device=q.device)
        out: Tensor = flex_attention(q, k, v, score_mod=penalized, block_mask=mask)
        return out


@lru_cache(maxsize=2)
def _flex_kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@lru_cache(maxsize=8)
def _flex_mask(queries: int, keys: int, *, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (keys - queries) >= key

    # Compiled, it computes the mask block by block; otherwise it allocates all of [queries, keys] for a moment.
    return create_block_mask(seen, None, None, queries, keys, device=str(device), _compile=device.type == "cuda")
