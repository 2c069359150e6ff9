"""Attention with ALiBi on a CPU: torch's kernel on blocks, with a backward pass that adds up in place.

Each block of queries takes its near keys with a small strip of bias. For its far keys, ALiBi is a line: the bias of the
block's last query, which is one row for all queries, plus a number for each query. Softmax ignores such a number, so
the kernel reads one row instead of a strip as long as the sequence, and the number is added to the logarithm of the sum
of weights. Near and far keys are joined by their sums.

With windows, each head takes only the far keys that have weight. What bounds them, the sum of the near keys' weights,
is there by then; in training, those that norms cannot exclude are looked at. The backward pass is that of what the
forward pass computed: it takes the same keys.

The row is computed from distances, as the strip is, and used for keys further away than a block is long: its rounding
is that of the strip at most twice as far.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from training.model.kernels.bias_blocks import BiasBlock, bias_blocks
from training.model.positions.bias import Bias
from training.model.windows import SEARCH_PART, first_keys, first_keys_with_weight, norms, reach, runs_of_heads

FAR_KEYS = 128  # far keys that a window takes or leaves together
FEWEST_SEARCHED = 2**14  # numbers in a block's queries of a head: with fewer, a search costs what it saves

Far = Sequence[tuple[slice, slice]]  # heads, and the far keys that they take

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strip: Tensor,
    row: Tensor | None,
    at_once: int,
    bias: Bias,
    radius: Tensor | None = None,
) -> Tensor:
    """Return causal attention with a bias that is linear in the distance.

    Args:
        q: [batch, local_heads, queries, head_dim], the last positions of the keys.
        k: [batch, local_heads, keys, head_dim].
        v: Like k.
        strip: Bias of the last queries on the last keys, [1, local_heads, rows, width].
        row: Bias of the last query on all keys, [1, local_heads, 1, keys]; None if no query sees a key that the strip
            does not cover.
        at_once: Queries of a block, at most `rows`, at most `width`.
        bias: The bias itself; if it is `lossless`, far keys without weight are left out.
        radius: Largest norm of a far key, if it is known, [batch, local_heads, 1].
    Returns:
        [batch, local_heads, queries, head_dim], in memory [queries, batch, local_heads, head_dim].
    """
    largest = None  # norm of a key up to each, [batch, local_heads, keys]
    if bias.lossless is not None and row is not None:
        known = norms(k.detach()).cummax(2).values if radius is None else radius
        largest = known.expand(-1, -1, k.shape[2])
    out: Tensor = _Blocks.apply(q, k, v, strip, row, at_once, bias, largest)  # type: ignore[no-untyped-call]
    return out


class _Blocks(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        strip: Tensor,
        row: Tensor | None,
        at_once: int,
        bias: Bias,
        largest: Tensor | None,
    ) -> Tensor:
        (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
        out = q.new_empty(queries, batch, heads, head_dim).permute(1, 2, 0, 3)
        # the logarithm of each query's sum of weights, [batch, local_heads, queries], in fp32 or wider
        sums = q.new_empty(batch, heads, queries, dtype=strip.dtype)
        ctx.far = []
        blocks = list(bias_blocks(strip, queries=queries, keys=keys, at_once=at_once))
        for block in blocks:
            rows, first = block.queries, block.first
            near = slice(first, block.seen)
            joined, total = _forward(q[:, :, rows], k[:, :, near], v[:, :, near], attn_mask=block.near)
            out[:, :, rows], sums[:, :, rows] = joined, total
            firsts = [first if row is None else 0] * heads
            if largest is not None and first:
                radius = largest[:, :, first - 1 : first]
                searched = is_searched(q[:, :, rows], trains=ctx.needs_input_grad[0])
                firsts = _first_far_keys(
                    q[:, :, rows], k, block, radius=radius, sums=total, bias=bias, searched=searched
                )
            ctx.far.append(list(runs_of_heads(firsts, end=first)))
            for some, seen in ctx.far[-1]:
                mask, offset = _line(row, block, heads=some, seen=seen)
                far, far_total = _forward(q[:, some, rows], k[:, some, seen], v[:, some, seen], attn_mask=mask)
                far_total, near_total = far_total - offset, total[:, some]
                both = torch.logaddexp(near_total, far_total)
                near_share, far_share = (near_total - both).exp()[..., None], (far_total - both).exp()[..., None]
                out[:, some, rows], sums[:, some, rows] = joined[:, some] * near_share + far * far_share, both
        if bias.lossless is not None:
            bias.lossless.add(torch.tensor(computed_share(blocks, ctx.far, heads=heads)))
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
        blocks = bias_blocks(strip, queries=q.shape[2], keys=keys, at_once=ctx.at_once)
        for block, runs in zip(blocks, ctx.far, strict=True):
            rows, near = block.queries, slice(block.first, block.seen)
            calls = [(slice(None), near, sums[:, :, rows], block.near)]
            for some, seen in runs:
                mask, offset = _line(row, block, heads=some, seen=seen)
                calls.append((some, seen, sums[:, some, rows] + offset, mask))
            for number, (some, seen, total, mask) in enumerate(calls):
                own = (grad[:, some, rows], q[:, some, rows], k[:, some, seen], v[:, some, seen], out[:, some, rows])
                part_q, part_k, part_v = _backward(*own, total.contiguous(), 0.0, False, attn_mask=mask)
                if number:
                    grad_q[:, some, rows] += part_q
                else:
                    grad_q[:, some, rows] = part_q
                grad_k[:, some, seen] += part_k
                grad_v[:, some, seen] += part_v
        return grad_q, grad_k, grad_v, None, None, None, None, None


def is_searched(q: Tensor, *, trains: bool) -> bool:
    """Return whether to look at the scores of far keys: that saves most of it in the backward pass.

    Args:
        q: A block's queries, [batch, local_heads, queries, head_dim].
        trains: Whether there will be a backward pass.
    """
    return trains and q[:, 0].numel() >= FEWEST_SEARCHED


def _first_far_keys(
    q: Tensor, k: Tensor, block: BiasBlock, *, radius: Tensor, sums: Tensor, bias: Bias, searched: bool
) -> list[int]:
    """Return the number of the first key that a block's queries need, by head; at its first near key or later: none."""
    assert bias.local_slopes is not None, "without slopes there is no window"
    position, slopes = block.seen - q.shape[2], bias.local_slopes
    distances = reach(q, radius=radius, sums=sums, slopes=slopes, part=1 - SEARCH_PART if searched else 1.0)
    firsts = first_keys(distances, position=position, step=FAR_KEYS)
    if not searched:
        return firsts
    return first_keys_with_weight(
        q,
        k,
        firsts=firsts,
        end=block.first,
        position=position,
        step=FAR_KEYS,
        sums=sums,
        radius=radius,
        slopes=slopes,
    )


def computed_share(blocks: Iterable[BiasBlock], far: Sequence[Far], *, heads: int) -> float:
    """Return the share of the scores of all blocks that near keys and windows are.

    Args:
        blocks: The blocks of one call.
        far: The far keys that are taken, by block.
        heads: Heads of this rank.
    """
    computed = whole = 0
    for block, runs in zip(blocks, far, strict=True):
        rows = block.queries.stop - block.queries.start
        taken = sum((some.stop - some.start) * (seen.stop - seen.start) for some, seen in runs)
        computed += rows * (heads * (block.seen - block.first) + taken)
        whole += rows * heads * block.seen
    return computed / whole


def _line(row: Tensor | None, block: BiasBlock, *, heads: slice, seen: slice) -> tuple[Tensor, Tensor]:
    """Return the bias of a block's last query on far keys, and that bias minus the one of each of its queries.

    Args:
        row: Bias of the last query on all keys, [1, local_heads, 1, keys].
        block: The block.
        heads: Some of the heads.
        seen: Some of the far keys.
    Returns:
        [1, heads, 1, seen] and [1, heads, queries].
    """
    assert row is not None, "far keys have a row"
    keys, count = row.shape[3], block.queries.stop - block.queries.start
    start = keys - block.seen
    return row[:, heads, :, start + seen.start : start + seen.stop], row[:, heads, 0, keys - count :]
