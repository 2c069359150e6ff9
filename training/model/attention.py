"""Causal attention with a bias. `configs.backends` has a row per kernel: what it can do and where it is."""

import logging
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from configs.backends import BACKENDS, Backend, candidates, installed_packages
from configs.positions import BiasKind
from configs.precisions import PRECISIONS
from parallel.documents import Documents
from training.model.positions.bias import Bias
from training.model.positions.method import PositionMethod
from training.model.windows import LosslessWindows

logger = logging.getLogger(__name__)


class Attention(Protocol):
    """One kernel with one bias."""

    bias: Bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return the output of causal attention; the queries are the last positions of the keys.

        Args:
            q: [batch, local_heads, queries, head_dim].
            k: [batch, local_heads, keys, head_dim].
            v: Like k.
            documents: Those that attention stays inside of, as many queries as keys; None for all before a query. Left
                out where there are none: a kernel whose row does not say `documents` need not take them.
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


def windows_of(module: nn.Module) -> LosslessWindows | None:
    """Return the windows of a module's blocks, which share one bias; None if it has no block, or they have none."""
    blocks = (layer for layer in module.modules() if isinstance(layer, AttentionBlock))
    return next((block.attend.bias.lossless for block in blocks), None)


class AutoAttention:
    """The fastest kernel that computes a bias, chosen for the device, type and head width of the first call with them.

    Attributes:
        bias: The bias.
    """

    def __init__(self, bias: Bias, *, documents: bool = False) -> None:
        """Take a bias.

        Args:
            bias: The bias.
            documents: Whether the kernel must be able to stay inside documents.
        """
        self.bias, self._documents = bias, documents
        self._refused: set[str] = set()
        self._kernels: dict[tuple[str, torch.dtype, int], tuple[Backend, Attention]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return [batch, local_heads, queries, head_dim], by the kernel for such queries."""
        kernel = self._kernel(q)[1]
        return kernel(q, k, v) if documents is None else kernel(q, k, v, documents)

    def backend(self, q: Tensor) -> Backend:
        """Return the backend of queries like these, [batch, local_heads, queries, head_dim]."""
        return self._kernel(q)[0]

    def refuse(self, q: Tensor, why: str) -> bool:
        """Replace the kernel of queries like these by the next one.

        Args:
            q: The queries.
            why: What is wrong with it here, for the log.
        Returns:
            Whether there is a next one.
        """
        backend = self.backend(q)
        fitting = self._candidates(q)
        if backend is fitting[-1]:
            return False
        self._refused.add(backend.name)
        self._kernels.clear()
        logger.warning("attention %s is not used: %s; using %s", backend.name, why, self.backend(q).name)
        return True

    def _kernel(self, q: Tensor) -> tuple[Backend, Attention]:
        key = (q.device.type, q.dtype, q.shape[3])
        if key not in self._kernels:
            backend = self._candidates(q)[0]
            self._kernels[key] = (backend, backend.load()(self.bias))
        return self._kernels[key]

    def _candidates(self, q: Tensor) -> list[Backend]:
        fitting = candidates(
            device=q.device.type,
            bias=kind_of(self.bias),
            precision=_precision_of(q.dtype),
            head_dim=q.shape[3],
            documents=self._documents,
            packages=installed_packages(),
            capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        )
        return [backend for backend in fitting if backend.name not in self._refused]


def _precision_of(dtype: torch.dtype) -> str:
    return next((name for name, row in PRECISIONS.items() if getattr(torch, row.dtype) is dtype), "none")


def kind_of(bias: Bias) -> BiasKind:
    """Return what a bias adds to the scores, for the table of backends."""
    if bias.causal_only:
        return "none"
    return "table" if bias.local_slopes is None else "slopes"


def make_attention(attention: str, bias: Bias, *, documents: bool = False) -> Attention:
    """Return the kernel for a value of `model.attention`, with a bias.

    Args:
        attention: The value.
        bias: The bias.
        documents: Whether `auto` must take one that can stay inside documents.
    Raises:
        MachineError: the kernel cannot run on this machine.
    """
    if attention == "auto":
        return AutoAttention(bias, documents=documents)
    kernel: Attention = BACKENDS[attention].load()(bias)
    return kernel


def backend_used(attend: Attention, *, attention: str, like: Tensor) -> Backend:
    """Return the backend of an attention made for a value of `model.attention`, for queries like `like`."""
    return attend.backend(like) if isinstance(attend, AutoAttention) else BACKENDS[attention]
