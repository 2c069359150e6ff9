"""Muon: each weight matrix moves along its momentum, made orthogonal; AdamW moves everything else.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the iteration; Liu et al.,
"Muon is scalable for LLM training", 2025, for the size of an update.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.parameter import Shard

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the iteration's polynomial, a x + b x^3 + c x^5
_RMS = 0.2  # of AdamW's updates

Work = Callable[[Shard, Tensor], Tensor]
OnWholeMatrices = Callable[[Sequence[Tensor], Sequence[Tensor], Work], None]


class Muon(torch.optim.AdamW):
    """Muon for the groups that are `of_matrices`, AdamW for the others.

    Matrices have the others' learning rate and weight decay, as their updates have the root mean square of AdamW's.

    Attributes:
        on_whole_matrices: Applies a function to whole matrices of which this rank holds parts; called with the tensors
            that are stepped, their updates, in which the results are put, and the function. To be set.
    """

    on_whole_matrices: OnWholeMatrices

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **adamw: Any) -> None:
        """Take the groups, the momentum and type of the matrices' products, and AdamW's arguments."""
        super().__init__(groups, **adamw)
        self._momentum, self._dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the groups that are there; `closure` must be None."""
        every = self.param_groups
        for group in every:
            if group["of_matrices"] and group["params"]:  # ZeRO 3 steps one group after the other
                self._step_matrices(group)
        self.param_groups = [group for group in every if not group["of_matrices"]]
        super().step(closure)
        self.param_groups = every

    def _step_matrices(self, group: dict[str, Any]) -> None:
        tensors = group["params"]
        # What torch's fused kernels do: divide the gradients, and change nothing in a step without finite ones.
        scale, skips = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        taken = 1.0 if skips is None else 1.0 - skips
        for tensor in tensors:
            gradient, average = tensor.grad, self.state[tensor]["exp_avg"]
            if scale is not None:
                gradient.div_(scale)
            if skips is not None:
                gradient.masked_fill_(skips.bool(), 0.0)
            average.lerp_(gradient, (1 - self._momentum) * taken)
            gradient.lerp_(average, self._momentum)  # Nesterov's
        gradients = [tensor.grad for tensor in tensors]
        self.on_whole_matrices(tensors, gradients, self._update)
        for tensor, update in zip(tensors, gradients, strict=True):
            tensor.mul_(1 - group["lr"] * group["weight_decay"] * taken)
            tensor.sub_(update.mul_(group["lr"] * taken))

    def _update(self, shard: Shard, momentum: Tensor) -> Tensor:
        """Return the update of a whole matrix; query, key and value of a fused one are matrices of their own."""
        rows, columns = shard.shape
        if shard.heads is None:
            return orthogonal(momentum[None], dtype=self._dtype)[0].mul_(_RMS * max(rows, columns) ** 0.5)
        parts = momentum.view(shard.heads, 3, -1, columns).transpose(0, 1).reshape(3, -1, columns)
        update = orthogonal(parts, dtype=self._dtype).mul_(_RMS * max(rows // 3, columns) ** 0.5)
        return update.view(3, shard.heads, -1, columns).transpose(0, 1).reshape(rows, columns)


def orthogonal(matrices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return matrices with the same singular vectors whose singular values are about 1, 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration; a singular value under a thousandth of the norm stays smaller.

    Args:
        matrices: [count, rows, columns], any type.
        dtype: Type of the products.
    """
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    orthogonalized: Tensor = (x.mT if is_tall else x).to(matrices.dtype)
    return orthogonalized
