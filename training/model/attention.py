"""Causal attention with a bias: the kernels by name. `configs.backends` says what each can do."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from configs.backends import backend_of
from training.model.kernels.flash import Flash
from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.bias import Bias


class Attention(Protocol):
    """One kernel with one bias."""

    bias: Bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what each query reads from the keys before it; the queries are the last positions.

        Args:
            q: [batch, local_heads, queries, head_dim].
            k: [batch, local_heads, keys, head_dim].
            v: Like k.
        Returns:
            [batch, local_heads, queries, head_dim], in q's type.
        """
        ...


KERNELS: dict[str, Callable[[Bias], Attention]] = {
    "reference": Reference,
    "sdpa": Sdpa,
    "flex": Flex,
    "flash": Flash,
}


def make_attention(attention: str, bias: Bias) -> Attention:
    """Return the kernel that a value of `model.attention` means, with a bias."""
    return KERNELS[backend_of(attention).name](bias)
