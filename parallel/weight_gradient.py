"""The gradient of a weight, added to an fp32 buffer by the matrix product that computes it.

A weight has the buffer as `main_grad`, megatron's name for it. Where it has none, autograd adds gradients up.
"""

from functools import cache

import torch
from torch import Tensor, nn


def add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add gradient^T x to the gradient of a linear's weight.

    Args:
        total: Where to add, [outputs, inputs], in the type of x or in fp32.
        gradient: Gradient of the linear's output, [tokens, outputs].
        x: The linear's input, [tokens, inputs].
    """
    if total.dtype == x.dtype:
        total.addmm_(gradient.t(), x)
    elif adds_in_product(total.device.type, x.dtype):
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    elif total.device.type == "cpu":  # which multiplies in fp32 anyway, and much faster
        total.addmm_(gradient.t().to(total.dtype), x.to(total.dtype))
    else:
        total.add_(gradient.t() @ x)


def hand_over(weight: nn.Parameter, gradient: Tensor) -> Tensor | None:
    """Add a gradient to the weight's buffer and return None; without a buffer, return it for autograd to add.

    Args:
        weight: The weight.
        gradient: The gradient, in the weight's shape and any type.
    """
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    if buffer is None:
        return gradient.to(weight.dtype)
    buffer.add_(gradient)
    return None


@cache
def adds_in_product(device: str, dtype: torch.dtype) -> bool:
    """Return whether a matrix product of this type adds to an fp32 matrix on this device, by trying one."""
    if device == "cpu":
        return False
    matrix = torch.eye(16, dtype=dtype, device=device)
    total = torch.full((16, 16), 2.0**-20, device=device)  # lost beside 1 if anything is rounded to 16 bits
    try:
        torch.addmm(total, matrix.t(), matrix, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # this torch or this GPU has no such product
        return False
    return torch.equal(total, matrix.float() + 2.0**-20)
