"""SwiGLU that keeps only its inputs for the backward pass, where nothing is compiled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def gated(gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> Tensor:
    """Return what `parallel.fused.swiglu` does; autograd would keep the SiLU too.

    Args:
        gate: A linear's output, [..., inner].
        gate_bias: Its bias, [inner]; None if it is added already.
        up: Another's, likewise.
        up_bias: Likewise.
    """
    gate = gate if gate_bias is None else gate + gate_bias
    up = up if up_bias is None else up + up_bias
    return _Gated.apply(gate, up)  # type: ignore[no-any-return,no-untyped-call]


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)
