"""What the functions between the matrix products take, and their results and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel import fused

EPSILON, HEADS = 1e-5, 3
STATE, PROJECTED, BIAS, PROJECTED_BIAS, NONE = "state", "projected", "bias", "projected bias", "none"


@dataclass(frozen=True)
class FusedCase:
    """A function, and what it takes: tensors by their kind, then plain arguments."""

    function: Callable[..., Any]
    kinds: tuple[str, ...]
    more: tuple[Any, ...] = ()

    def arguments(self, *, rows: int, width: int, device: torch.device | None = None) -> list[Tensor | None]:
        """Return random tensors in fp32: far from zero, where a mean of squares minus a squared mean would be lost."""
        torch.manual_seed(rows)
        shapes = {STATE: (rows, width), PROJECTED: (rows, 3 * width), BIAS: (width,), PROJECTED_BIAS: (3 * width,)}
        return [None if kind == NONE else 2 * torch.randn(shapes[kind], device=device) + 3 for kind in self.kinds]

    def results(
        self, function: Callable[..., Any], values: list[Tensor | None], *, dtype: torch.dtype, lies_otherwise: bool
    ) -> list[Tensor]:
        """Return the results of a function in the place of this one, and the gradients for random ones of them.

        Args:
            function: It.
            values: Of `arguments`.
            dtype: What to compute in.
            lies_otherwise: Whether states and gradients are transposed in memory.
        """
        leaves = [
            None if value is None else _laid(value.to(dtype), lies_otherwise).requires_grad_() for value in values
        ]
        results = function(*leaves, *self.more)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(1)
        gradients = [torch.randn(x.shape, device=x.device).to(dtype) for x in results]
        torch.autograd.backward(results, [_laid(gradient, lies_otherwise) for gradient in gradients])
        return [*results, *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[list-item]


def _laid(x: Tensor, otherwise: bool) -> Tensor:
    x = x.detach().clone()
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if otherwise else x


FUSED_CASES = {
    "norm": FusedCase(fused.normalize, (STATE, BIAS, BIAS), (EPSILON,)),
    "norm without bias": FusedCase(fused.normalize, (STATE, BIAS, NONE), (EPSILON,)),
    "residual norm": FusedCase(fused.add_and_normalize, (STATE, STATE, BIAS, BIAS, BIAS), (EPSILON,)),
    "residual norm after dropout": FusedCase(fused.add_and_normalize, (STATE, STATE, NONE, BIAS, BIAS), (EPSILON,)),
    "residual norm without biases": FusedCase(fused.add_and_normalize, (STATE, STATE, NONE, BIAS, NONE), (EPSILON,)),
    "norm of kept states": FusedCase(fused.add_and_normalize, (STATE, NONE, NONE, BIAS, BIAS), (EPSILON,)),
    "residual": FusedCase(fused.add_to_residual, (STATE, STATE, BIAS)),
    "residual without bias": FusedCase(fused.add_to_residual, (STATE, STATE, NONE)),
    "heads": FusedCase(fused.split_heads, (PROJECTED, PROJECTED_BIAS), (HEADS,)),
    "one head": FusedCase(fused.split_heads, (PROJECTED, PROJECTED_BIAS), (1,)),
    "heads without bias": FusedCase(fused.split_heads, (PROJECTED, NONE), (HEADS,)),
    "tanh": FusedCase(fused.gelu_tanh, (STATE, BIAS)),
    "exact": FusedCase(fused.gelu_exact, (STATE, BIAS)),
    "exact without bias": FusedCase(fused.gelu_exact, (STATE, NONE)),
    "swiglu": FusedCase(fused.swiglu, (STATE, BIAS, STATE, BIAS)),
    "swiglu without biases": FusedCase(fused.swiglu, (STATE, NONE, STATE, NONE)),
}
