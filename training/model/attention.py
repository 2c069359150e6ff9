"""Causal attention with a bias. `configs.backends` has a row per kernel: what it can do and where it is."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from configs.backends import backend_of
from training.model.positions.bias import Bias
from training.model.positions.method import PositionMethod


class Attention(Protocol):
    """One kernel with one bias."""

    bias: Bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of causal attention; the queries are the last positions of the keys.

        Args:
            q: [batch, local_heads, queries, head_dim].
            k: [batch, local_heads, keys, head_dim].
            v: Like k.
        Returns:
            [batch, local_heads, queries, head_dim], in q's type.
        """
        ...


@runtime_checkable
class AttentionBlock(Protocol):
    """Attributes of each family's block, by which the certificate finds and measures it.

    Attributes:
        attend: Its attention.
        position: Its position method.
    """

    attend: Attention
    position: PositionMethod


def make_attention(attention: str, bias: Bias) -> Attention:
    """Return the kernel for a value of `model.attention`, with a bias.

    Raises:
        MachineError: the kernel cannot run on this machine.
    """
    kernel: Attention = backend_of(attention).load()(bias)
    return kernel
