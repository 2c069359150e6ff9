"""An attention's output and gradients, compared with those of attention written out.

A compiled kernel has been seen to give NaN gradients where its output was right: nothing would train, or worse. So they
are checked once at start, on the device, before they are used.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel.compiled import CompilerFailure, compiling
from parallel.documents import Documents
from training.model.attention import Attention, AutoAttention
from training.model.kernels.reference import Reference

SEQ = 131  # more than one block of a kernel, and a multiple of none
FIRSTS = (0, 1, 50, 129)  # first tokens of the documents that attention is compared in, if it must stay inside them
ROW_ERRORS = 10  # what gradients may be off, in units of what a row may: bf16 rounds queries, weights and outputs


def kernel_error(
    attend: Attention,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    documents: bool = False,
) -> float:
    """Return how far an attention's output and, where gradients are enabled, those are from exact; nan if one is.

    Args:
        attend: Any kernel.
        heads: Heads of this rank.
        head_dim: Their width.
        dtype: Type of queries, keys and values.
        device: Where to compute.
        documents: Whether to compare it inside documents, which a kernel without a mask of them cannot do.
    Returns:
        The largest difference, relative to the largest entry of the exact tensor.
    """
    generator = torch.Generator().manual_seed(SEQ)
    # as the projection gives them: [seq, batch, local_heads, 3, head_dim] -> 3 x [batch, local_heads, seq, head_dim]
    drawn = torch.randn(SEQ, 1, heads, 3, head_dim, generator=generator).to(device, dtype)
    inputs = drawn.permute(3, 1, 2, 0, 4).unbind()
    weight = torch.randn(1, heads, SEQ, head_dim, generator=generator).to(device, dtype)
    inside = _documents(device) if documents else None
    ours = _output_and_gradients(attend, inputs, weight=weight, documents=inside)
    wide = torch.promote_types(torch.float32, dtype)
    exact = _output_and_gradients(
        Reference(attend.bias), tuple(x.to(wide) for x in inputs), weight=weight.to(wide), documents=inside
    )
    errors = [(x.to(wide) - y).abs().max() / y.abs().max() for x, y in zip(ours, exact, strict=True)]
    return float(torch.stack(errors).max())  # max keeps nan


def _documents(device: torch.device) -> Documents:
    return Documents(torch.isin(torch.arange(SEQ), torch.tensor(FIRSTS))[None], device=device)


def _output_and_gradients(
    attend: Attention, inputs: tuple[Tensor, ...], *, weight: Tensor, documents: Documents | None
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs)
    out = attend(q, k, v) if documents is None else attend(q, k, v, documents)
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), weight) if torch.is_grad_enabled() else ())]


def kernel_fault(
    attend: Attention,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    limit: float,
    documents: bool = False,
) -> str | None:
    """Return what is wrong with an attention as `kernel_error` measures it, None if nothing is.

    `auto` takes the next kernel instead, and says so in one line, as long as it has one.

    Args:
        attend: The attention.
        heads: Heads of this rank.
        head_dim: Their width.
        dtype: Type of queries, keys and values.
        device: Where to compute.
        limit: Largest error allowed, as `kernel_error` measures it.
        documents: Whether to compare it inside documents.
    """
    measure = partial(
        kernel_error, attend, heads=heads, head_dim=head_dim, dtype=dtype, device=device, documents=documents
    )
    while True:
        fault = _fault(measure, limit=limit)
        if fault is None or not isinstance(attend, AutoAttention):
            return fault
        if not attend.refuse(torch.empty(1, heads, 1, head_dim, dtype=dtype, device=device), fault):
            return fault


def _fault(measure: Callable[[], float], *, limit: float) -> str | None:
    try:
        with compiling():
            error = measure()
    except CompilerFailure as failure:
        return f"it fails here ({failure})"
    return None if error <= limit else f"its output or gradients are wrong by {error:.3g} (allowed {limit:g})"
