"""Causal attention with a bias, in blocks of queries so that memory grows linearly with length.

A bias depends on distance alone, so the block of queries that ends at key k needs the last k columns of
one strip, the strip of the sequence's last block. The strip is shared by all layers and kept between
calls; no layer keeps anything of size [seq, seq].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.model.alibi import causal_bias

QUERY_BLOCK = 256

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class BiasStrip:
    """The bias of a block of queries on all keys before it, made once for a length."""

    def __init__(self, local_slopes: Tensor) -> None:
        self.slopes = local_slopes
        self._strip: Tensor | None = None

    def block(self, *, queries: int, keys: int, like: Tensor) -> Tensor:
        """Return the bias [1, local_heads, queries, keys] of the queries that end at the last key."""
        strip = self._strip
        # The strip's type is at least fp32: a bf16 bias would lose mass, and fp64 must stay fp64.
        dtype = torch.promote_types(torch.float32, like.dtype)
        rows = max(queries, min(QUERY_BLOCK, keys))
        if (
            strip is None
            or strip.device != like.device
            or strip.dtype != dtype
            or strip.shape[1] < rows
            or strip.shape[2] < keys
        ):
            strip = causal_bias(self.slopes.to(like.device, dtype), queries=rows, keys=keys)
            self._strip = strip
        block: Tensor = strip[None, :, strip.shape[1] - queries :, strip.shape[2] - keys :]
        return block


def reference(bias: BiasStrip) -> Attention:
    """Return attention written out: softmax(q k^T / sqrt(d) + bias) v, in one piece, in fp32 or wider."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(torch.float32, q.dtype)
        scores = (q.to(wide) @ k.to(wide).mT) / q.shape[-1] ** 0.5
        scores = scores + bias.block(queries=q.shape[2], keys=k.shape[2], like=scores)
        joined: Tensor = scores.softmax(-1) @ v.to(wide)
        return joined.to(q.dtype)

    return attend


def sdpa(bias: BiasStrip) -> Attention:
    """Return attention by torch's scaled_dot_product_attention, a block of queries at a time."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = k.shape[2] - q.shape[2]
        blocks = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            query = q[:, :, start : start + QUERY_BLOCK]
            keys = before + start + query.shape[2]
            mask = bias.block(queries=query.shape[2], keys=keys, like=q)
            blocks.append(_attend_block(query, k[:, :, :keys], v[:, :, :keys], mask))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)

    return attend


def _attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # CUDA kernels want the mask in the queries' type, and aligned; rounding a relative bias loses little. cuDNN is left
    # out: it has read fp32 masks as bf16 and given NaN gradients with masks at some lengths (pytorch#191612, #196678).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype).contiguous())


BACKENDS: dict[str, Callable[[BiasStrip], Attention]] = {"reference": reference, "sdpa": sdpa}
AUTO = "sdpa"
