"""Attention by torch's scaled_dot_product_attention, a block of queries at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from configs.backends import BACKENDS
from parallel.documents import Documents
from training.model.kernels.bias_blocks import bias_blocks
from training.model.kernels.each_document import attend_each
from training.model.kernels.sdpa_cpu import attend_by_blocks, computed_share
from training.model.positions.bias import QUERY_BLOCK, Bias, padded

NEAR_KEYS = BACKENDS["sdpa"].nearest  # on a CPU, keys of a strip that stays in the caches
KERNEL_READS = 8  # elements of a mask that a GPU kernel loads together, of any type


class Sdpa:
    """Blocks of QUERY_BLOCK queries over one strip of bias; each block sees only the keys before its end.

    The causal mask removes half of the scores; this way, most of that half is not computed. With a sliding window, each
    block also takes only the keys from its first query's window on.
    """

    def __init__(self, bias: Bias) -> None:
        self.bias = bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        if documents is not None:
            return attend_each(Sdpa, q, k, v, documents=documents, bias=self.bias)
        queries, keys = q.shape[2], k.shape[2]
        window = self.bias.window
        if window is not None and window >= keys:
            window = None
        if self.bias.causal_only and queries in (1, keys) and window is None:
            self._note(1.0, q)
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
        rows = min(queries, QUERY_BLOCK)
        # GPU kernels need the mask in the queries' type. The bias is relative, so rounding it loses little.
        dtype = q.dtype if q.is_cuda else torch.promote_types(torch.float32, q.dtype)
        by_line = self.bias.local_slopes is not None and not q.is_cuda and window is None
        width = min(keys, max(rows, NEAR_KEYS)) if by_line and queries > 1 else keys
        if window is not None:
            width = min(keys, padded(rows + window - 1))  # from the first query's first key to the last query
        strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype)
        if by_line or not (window is None or self.bias.learned or q.is_cuda):
            row = self.bias(rows=1, keys=keys, device=q.device, dtype=dtype) if by_line and width < keys else None
            return attend_by_blocks(q, k, v, strip=strip, row=row, at_once=rows, bias=self.bias)
        # A mask that needs a gradient makes torch compute and keep all scores: recompute each block instead.
        attend = _attend_recomputed if self.bias.learned and torch.is_grad_enabled() else _attend_block
        blocks = list(bias_blocks(strip, queries=queries, keys=keys, at_once=rows))
        self._note(computed_share(blocks, [()] * len(blocks), heads=1), q)
        joined = []
        for block in blocks:
            near = slice(block.first, block.seen)
            joined.append(attend(q[:, :, block.queries], k[:, :, near], v[:, :, near], block.near))
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=2)

    def _note(self, density: float, q: Tensor) -> None:
        if self.bias.lossless is not None:
            self.bias.lossless.add(q.new_full((), density, dtype=torch.float32))


def attend_next(q: Tensor, k: Tensor, v: Tensor, *, bias: Bias, radius: Tensor) -> Tensor:
    """Return the attention of one query after a cache, on a CPU; far keys without weight are not even read.

    Args:
        q: [batch, local_heads, 1, head_dim].
        k: [batch, local_heads, keys, head_dim].
        v: Like k.
        bias: One with slopes.
        radius: Largest norm of a key, [batch, local_heads, 1].
    Returns:
        [batch, local_heads, 1, head_dim].
    """
    keys, dtype = k.shape[2], torch.promote_types(torch.float32, q.dtype)
    row = bias(rows=1, keys=keys, device=q.device, dtype=dtype)
    strip = row[..., max(0, keys - NEAR_KEYS) :]
    return attend_by_blocks(q, k, v, strip=strip, row=row, at_once=1, bias=bias, radius=radius)


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
