"""Causal attention with a bias. `configs.backends` has a row per kernel: what it can do and where it is."""

from typing import Protocol

from torch import Tensor

from configs.backends import backend_of
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


def make_attention(attention: str, bias: Bias) -> Attention:
    """Return the kernel that a value of `model.attention` means, with a bias.

    Raises:
        MachineError: the kernel cannot run on this machine.
    """
    kernel: Attention = backend_of(attention).load()(bias)
    return kernel
