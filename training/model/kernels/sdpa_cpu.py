"""Attention with ALiBi on a CPU: torch's kernel on blocks, with a backward pass that adds up in place.

Each block of queries makes two calls. Its near keys take a small strip of bias. For its far keys, ALiBi is a line: the
bias of the block's last query, which is one row for all queries, plus a number for each query. Softmax ignores such a
number, so the kernel reads one row instead of a strip as long as the sequence, and the number is added to the logarithm
of the sum of weights. Two calls of one row of attention are joined by their sums.

The row is computed from distances, as the strip is, and used for keys further away than a block is long: its rounding
is that of the strip at most twice as far.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from training.model.kernels.bias_blocks import BiasBlock, bias_blocks

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, *, strip: Tensor, row: Tensor | None, at_once: int) -> Tensor:
    """Return causal attention with a bias that is linear in the distance.

    Args:
        q: [batch, local_heads, queries, head_dim], the last positions of the keys.
        k: [batch, local_heads, keys, head_dim].
        v: Like k.
        strip: Bias of the last queries on the last keys, [1, local_heads, rows, width].
        row: Bias of the last query on all keys, [1, local_heads, 1, keys]; None if the strip covers all keys.
        at_once: Queries of a block, at most `rows`, at most `width`.
    Returns:
        [batch, local_heads, queries, head_dim], in memory [queries, batch, local_heads, head_dim].
    """
    out: Tensor = _Blocks.apply(q, k, v, strip, row, at_once)  # type: ignore[no-untyped-call]
    return out


class _Blocks(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, strip: Tensor, row: Tensor | None, at_once: int) -> Tensor:
        (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
        out = q.new_empty(queries, batch, heads, head_dim).permute(1, 2, 0, 3)
        # the logarithm of each query's sum of weights, [batch, local_heads, queries], in fp32 or wider
        sums = q.new_empty(batch, heads, queries, dtype=strip.dtype)
        for block in bias_blocks(strip, queries=queries, keys=keys, at_once=at_once):
            part, first = q[:, :, block.queries], block.first
            near = slice(first, block.seen)
            joined, total = _forward(part, k[:, :, near], v[:, :, near], attn_mask=block.near)
            if row is not None and first:
                far, far_total = _forward(part, k[:, :, :first], v[:, :, :first], attn_mask=_far(row, block, keys=keys))
                far_total = far_total - _offset(row, block)
                near_total, total = total, torch.logaddexp(total, far_total)
                joined = joined * (near_total - total).exp()[..., None] + far * (far_total - total).exp()[..., None]
            out[:, :, block.queries], sums[:, :, block.queries] = joined, total
        ctx.save_for_backward(q, k, v, out, sums, strip, row)
        ctx.at_once = at_once
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, strip, row = ctx.saved_tensors
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        keys = k.shape[2]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in bias_blocks(strip, queries=q.shape[2], keys=keys, at_once=ctx.at_once):
            rows, first, total = block.queries, block.first, sums[:, :, block.queries]
            near = slice(first, block.seen)
            calls = [(near, total, block.near)]
            if row is not None and first:
                calls.append((slice(0, first), total + _offset(row, block), _far(row, block, keys=keys)))
            for number, (seen, known, mask) in enumerate(calls):
                own = (grad[:, :, rows], q[:, :, rows], k[:, :, seen], v[:, :, seen], out[:, :, rows])
                part_q, part_k, part_v = _backward(*own, known.contiguous(), 0.0, False, attn_mask=mask)
                if number:
                    grad_q[:, :, rows] += part_q
                else:
                    grad_q[:, :, rows] = part_q
                grad_k[:, :, seen] += part_k
                grad_v[:, :, seen] += part_v
        return grad_q, grad_k, grad_v, None, None, None


def _far(row: Tensor, block: BiasBlock, *, keys: int) -> Tensor:
    """Return the bias of a block's last query on its far keys, [1, local_heads, 1, first]."""
    start = keys - block.seen
    return row[..., start : start + block.first]


def _offset(row: Tensor, block: BiasBlock) -> Tensor:
    """Return the bias of a block's last query minus that of each of its queries, [1, local_heads, queries]."""
    count = block.queries.stop - block.queries.start
    return row[:, :, 0, row.shape[3] - count :]
