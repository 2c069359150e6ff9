"""An attention's output and gradients, compared with those of attention written out.

A compiled kernel has been seen to give NaN gradients where its output was right: nothing would train, or worse. So they
are checked once at start, on the device, before they are used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.step_sizes import lengths_of
from parallel.compiled import CompilerFailure, compiling
from parallel.documents import Documents
from training.model.attention import Attention, AutoAttention
from training.model.kernels.reference import Reference

ROWS = 131  # last queries that are compared: more than one block of a kernel, and a multiple of none
LONGEST = 2048  # tokens; kernels leave out keys without weight from here on at the latest
SHORTEST = 128  # tokens of pieces that are compared: shorter ones, at ROWS each, would take far more than they train on
ROW_ERRORS = 10  # what gradients may be off, in units of what a row may: bf16 rounds queries, weights and outputs


@dataclass(frozen=True)
class Batch:
    """What an attention is compared on.

    A kernel that is compiled for each shape is the one that trains only where shape and strides are those of training.

    Attributes:
        sequences: Sequences of a micro-batch.
        tokens: Tokens of a sequence.
        apart: Whether queries, keys and values lie in one piece each, or side by side, as the projection gives them.
    """

    sequences: int = 1
    tokens: int = ROWS
    apart: bool = False

    @classmethod
    def of_training(cls, sequences: int, tokens: int, *, apart: bool) -> "Batch":
        """Return a run's own micro-batch, or one long sequence where its sequences would take too much memory."""
        return cls(1, LONGEST, apart) if tokens > LONGEST else cls(sequences, max(ROWS, tokens), apart)


SHORT = Batch()


def batches_of_training(config: RunConfig, *, apart: bool) -> list[Batch]:
    """Return a run's micro-batch at each of its lengths, without those of `train.length_warmup` under SHORTEST."""
    *shorter, full = lengths_of(config)
    tokens = config.train.micro_batch * full
    lengths = [*(length for length in shorter if length >= SHORTEST), full]
    batches = (Batch.of_training(tokens // length, length, apart=apart) for length in lengths)
    return list(dict.fromkeys(batches))


def kernel_error(
    attend: Attention,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: Batch = SHORT,
    documents: bool = False,
) -> float:
    """Return how far an attention's output and, where gradients are enabled, those are from exact; nan if one is.

    Args:
        attend: Any kernel.
        heads: Heads of this rank.
        head_dim: Their width.
        dtype: Type of queries, keys and values.
        device: Where to compute.
        batch: What to compare it on: the last ROWS queries, and their gradients.
        documents: Whether to compare it inside documents, which a kernel without a mask of them cannot do.
    Returns:
        The largest difference, relative to the largest entry of the exact tensor; of a gradient that is exactly zero,
        relative to that of the values' gradient: in a window of one token, queries and keys have none.
    """
    generator = torch.Generator(device).manual_seed(ROWS)
    inputs = _drawn(batch, heads=heads, head_dim=head_dim, dtype=dtype, generator=generator)
    weight = torch.randn(batch.sequences, heads, ROWS, head_dim, generator=generator, device=device).to(dtype)
    inside = _documents(batch, device) if documents else None
    ours = _output_and_gradients(attend, inputs, queries=batch.tokens, weight=weight, documents=inside)
    wide = torch.promote_types(torch.float32, dtype)
    exact = _output_and_gradients(  # of the last queries alone: it takes the memory of all scores that it is asked for
        Reference(attend.bias),
        tuple(x.to(wide) for x in inputs),
        queries=ROWS,
        weight=weight.to(wide),
        documents=inside,
    )
    errors = []
    for x, y in zip(ours, exact, strict=True):
        scale = y if y.any() else exact[-1]
        errors.append((x.to(wide) - y).abs().max() / scale.abs().max())
    return float(torch.stack(errors).max())  # max keeps nan


def _drawn(
    batch: Batch, *, heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return random queries, keys and values, [batch, local_heads, seq, head_dim] each."""
    shape = (batch.tokens, batch.sequences, heads, 3, head_dim)
    drawn = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    parts = tuple(part.contiguous() if batch.apart else part for part in drawn.unbind(3))
    return tuple(part.permute(1, 2, 0, 3) for part in parts)


def _documents(batch: Batch, device: torch.device) -> Documents:
    """Return documents that begin anywhere, some of them within the last rows."""
    firsts = torch.tensor([0, 1, 50, batch.tokens // 2 + 3, batch.tokens - 81, batch.tokens - 2])
    begins = torch.isin(torch.arange(batch.tokens), firsts)
    return Documents(begins.expand(batch.sequences, -1), device=device)


def _output_and_gradients(
    attend: Attention, inputs: tuple[Tensor, ...], *, queries: int, weight: Tensor, documents: Documents | None
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs)
    asked = q[:, :, -queries:]
    out = (attend(asked, k, v) if documents is None else attend(asked, k, v, documents))[:, :, -ROWS:]
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), weight) if torch.is_grad_enabled() else ())]


def kernel_fault(
    attend: Attention,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    limit: float,
    batches: Sequence[Batch],
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
        batches: What to compare it on.
        documents: Whether to compare it inside documents.
    """
    measure = partial(
        kernel_error,
        attend,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        documents=documents,
    )
    while True:
        faults = (_fault(partial(measure, batch=batch), limit=limit) for batch in batches)
        fault = next(filter(None, faults), None)
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
