"""What lies between the matrix products: functions of tensors without collectives, so that each can be compiled.

Rows are tokens: states are [tokens, hidden], or of any leading shape.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Return the LayerNorm of states, [..., hidden]."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def add_to_residual(x: Tensor, output: Tensor, output_bias: Tensor | None) -> Tensor:
    """Return states plus a linear's output and its bias, [..., hidden]."""
    added = x + output
    # The sum is new, so nobody sees that it is written again.
    return added if output_bias is None else added.add_(output_bias)


def add_and_normalize(
    x: Tensor, output: Tensor | None, output_bias: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return states plus a linear's output, if there is one, and its bias; and their LayerNorm, [..., hidden] each.

    Where both results are used, a kernel can add their gradients in one pass.
    """
    x = x if output is None else add_to_residual(x, output, output_bias)
    return x, normalize(x, weight, bias, epsilon)


def split_heads(qkv: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values of a linear's output and its bias, [tokens, heads, head_dim] each.

    Args:
        qkv: [tokens, heads * 3 * head_dim], its columns ordered by head, part, dim.
        bias: The linear's.
        heads: Heads of this tensor rank.
    """
    parts = (qkv if bias is None else qkv + bias).view(len(qkv), heads, 3, -1).unbind(2)
    return tuple(part.contiguous() for part in parts)


def gelu_tanh(up: Tensor, bias: Tensor | None) -> Tensor:
    """Return the GELU, in its tanh form, of a linear's output and its bias, [..., inner]."""
    return F.gelu(up if bias is None else up + bias, approximate="tanh")


def gelu_exact(up: Tensor, bias: Tensor | None) -> Tensor:
    """Return the GELU of a linear's output and its bias, [..., inner]."""
    return F.gelu(up if bias is None else up + bias)


def swiglu(gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> Tensor:
    """Return the SiLU of one linear's output and its bias times another's output and its bias, [..., inner]."""
    gate = gate if gate_bias is None else gate + gate_bias
    return F.silu(gate) * (up if up_bias is None else up + up_bias)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"gelu_tanh": gelu_tanh, "gelu_erf": gelu_exact, "swiglu": swiglu}
"""The activations by the word of a family's description."""
