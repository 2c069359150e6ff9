"""Queries, keys and values from the projection's output, and their gradients written into one buffer."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


def view_heads(qkv: Tensor, *, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as views of the projection's output; nothing is copied.

    The backward pass writes the three gradients into one buffer in the projection's layout. Plain views would give
    each gradient a buffer of its own, stack the three and copy the stack into that layout. Change none of the views
    in place.

    Args:
        qkv: Output of the projection, [seq, batch, local_heads * 3 * head_dim], its columns ordered by head, part, dim.
        heads: Heads of this tensor rank.
    Returns:
        Three tensors [batch, local_heads, seq, head_dim].
    """
    q, k, v = _ViewHeads.apply(qkv, heads)  # type: ignore[no-untyped-call]
    return q, k, v


class _ViewHeads(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        seq, batch, _ = qkv.shape
        # [seq, batch, local_heads, 3, head_dim] -> 3 x [batch, local_heads, seq, head_dim]
        return qkv.view(seq, batch, heads, 3, -1).permute(3, 1, 2, 0, 4).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        batch, heads, seq, head_dim = grads[0].shape
        joined = grads[0].new_empty(seq, batch, heads, 3, head_dim)
        for part, grad in enumerate(grads):
            joined[:, :, :, part] = grad.permute(2, 0, 1, 3)
        return joined.view(seq, batch, -1), None
