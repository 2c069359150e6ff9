"""Attention by torch's scaled_dot_product_attention, a block of queries at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from training.model.kernels.bias_blocks import bias_blocks
from training.model.kernels.sdpa_cpu import attend_by_blocks
from training.model.positions.bias import QUERY_BLOCK, Bias

STRIP_KEYS = 1024  # on a CPU, a strip as long as the sequence is the fastest up to here
NEAR_KEYS = 512  # in longer sequences, keys of a strip that stays in the caches
KERNEL_READS = 8  # elements of a mask that a GPU kernel loads together, of any type


class Sdpa:
    """Blocks of QUERY_BLOCK queries over one strip of bias; each block sees only the keys before its end.

    The causal mask removes half of the scores; this way, most of that half is not computed.
    """

    def __init__(self, bias: Bias) -> None:
        self.bias = bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        queries, keys = q.shape[2], k.shape[2]
        if self.bias.causal_only and queries in (1, keys):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
        rows = min(queries, QUERY_BLOCK)
        # GPU kernels need the mask in the queries' type. The bias is relative, so rounding it loses little.
        dtype = q.dtype if q.is_cuda else torch.promote_types(torch.float32, q.dtype)
        by_line = self.bias.local_slopes is not None and not q.is_cuda
        width = max(rows, NEAR_KEYS) if by_line and queries > 1 and keys > STRIP_KEYS else keys
        strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype)
        if by_line:
            row = self.bias(rows=1, keys=keys, device=q.device, dtype=dtype) if width < keys else None
            return attend_by_blocks(q, k, v, strip=strip, row=row, at_once=rows)
        # A mask that needs a gradient makes torch compute and keep all scores: recompute each block instead.
        attend = _attend_recomputed if self.bias.learned and torch.is_grad_enabled() else _attend_block
        blocks = [
            attend(q[:, :, block.queries], k[:, :, : block.seen], v[:, :, : block.seen], block.near)
            for block in bias_blocks(strip, queries=queries, keys=keys, at_once=rows)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _attend_recomputed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend, and recompute it in the backward pass instead of keeping the scores; nothing in it is random."""
    out: Tensor = checkpoint(_attend_block, q, k, v, mask, use_reentrant=False, preserve_rng_state=False)
    return out


def _attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Leave cuDNN out: it has read fp32 masks as bf16, and given NaN gradients with masks at some lengths
    # (pytorch#191612, #196678).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=aligned(mask))


def aligned(mask: Tensor) -> Tensor:
    """Return a mask [1, heads, rows, keys] with its start and rows aligned as a GPU kernel reads them.

    A slice of the shared strip costs no memory in any layer. But torch copies a mask whose strides are not
    multiples of 8 elements, and the kernel refuses one that does not start at a multiple.
    """
    if all(offset % KERNEL_READS == 0 for offset in (mask.storage_offset(), *mask.stride()[:-1])):
        return mask
    keys = mask.shape[3]
    return F.pad(mask, (0, -keys % KERNEL_READS))[..., :keys]
