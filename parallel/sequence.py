"""Sequence parallelism: between the linears, each tensor rank holds its own part of the sequence.

megatron's linears gather the parts and scatter their sums. What is left is here: the gradients of parameters that are
whole on every rank but were used on its part alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axes import Group


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # One collective for all of them, in fp32 or wider: each rank has only a part of a sum.
        wide = torch.promote_types(torch.float32, gradients[0].dtype)
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(wide)
        dist.all_reduce(flat, group=ctx.group)
        parts = torch.split(flat.to(gradients[0].dtype), [gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


def with_summed_gradients(*parameters: Tensor, tensor: Group) -> tuple[Tensor, ...]:
    """Return parameters that are used on this rank's part of the sequence: their gradients are summed over the ranks.

    Args:
        parameters: Equal on all tensor ranks.
        tensor: The tensor axis.
    """
    summed: tuple[Tensor, ...] = _SumGradients.apply(tensor.handle, *parameters)  # type: ignore[no-untyped-call]
    return summed
