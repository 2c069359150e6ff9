"""Selective recompute: keep what matrix products gave, and compute again in the backward pass what lies between them.

A linear keeps its input for its weight's gradient. Here that input is the result of a function that is cheap to run
again, so both the function and the linear keep only the function's inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class _Result(torch.autograd.Function):
    """The identity, which saves its input: within a checkpoint, reading it runs the checkpoint's function again."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        ctx.save_for_backward(result)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return a function's result, a tensor or a tuple of them; the last of them is for `feed`.

    Args:
        function: Draws no random number and contains no collective.
        inputs: Kept for the backward pass.
    """

    def run(*inputs: Any) -> Any:
        result = function(*inputs)
        if isinstance(result, Tensor):
            return _Result.apply(result)  # type: ignore[no-untyped-call]
        return *result[:-1], _Result.apply(result[-1])  # type: ignore[no-untyped-call]

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def feed(linear: Callable[[Tensor], Any], result: Tensor) -> Any:
    """Return a linear's output for a result of `recomputed`, without keeping the result for the backward pass."""
    node: Any = result.grad_fn
    address = result.data_ptr()

    def pack(saved: Tensor) -> Any:
        return node if saved.data_ptr() == address else saved

    def unpack(packed: Any) -> Tensor:
        # Read once: a checkpoint gives each saved tensor only once.
        tensor: Tensor = packed if isinstance(packed, Tensor) else packed.saved_tensors[0]
        return tensor

    with saved_tensors_hooks(pack, unpack):
        return linear(result)


def directly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return a function's result: the same without recomputing."""
    return function(*inputs)
