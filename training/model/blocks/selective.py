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
    again, address = _Again(result), result.data_ptr()

    def pack(saved: Tensor) -> Any:
        return again.promised() if saved.data_ptr() == address else saved

    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else packed.read()
        return tensor

    with saved_tensors_hooks(pack, unpack):
        return linear(result)


class _Again:
    """A result of `recomputed`, which is computed again for the first that reads it and kept until the last has.

    A checkpoint gives each saved tensor only once, and a pair of linears has two readers.
    """

    def __init__(self, result: Tensor) -> None:
        self._node: Any = result.grad_fn
        self._result: Tensor | None = None
        self._readers = 0

    def promised(self) -> "_Again":
        self._readers += 1
        return self

    def read(self) -> Tensor:
        result: Tensor = self._node.saved_tensors[0] if self._result is None else self._result
        self._readers -= 1
        self._result = result if self._readers else None
        return result


def directly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return a function's result: the same without recomputing."""
    return function(*inputs)
