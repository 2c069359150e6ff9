"""`train.compile`: the functions between the matrix products compiled, each once, whatever layers use it.

Collectives and attention are left out, so that it works in every layout. torch keeps what it compiled in a folder of
the machine, TORCHINDUCTOR_CACHE_DIR or one in /tmp: later starts read it, and other CPU ranks.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import NO_MEMORY
from parallel.compilers import is_compiled, missing_compiler
from parallel.fused import add_and_normalize, add_to_residual, normalize, split_heads, swiglu
from parallel.head import Compile, as_it_is
from parallel.start import environment


def make_compile(word: str, *, device: torch.device) -> Compile:
    """Return what compiles functions on a device; `compiling_fault` says whether the machine can.

    With `triton`, those of `parallel.fused` become Triton kernels; the head's are left to torch.compile.

    Args:
        word: Value of `train.compile`.
        device: Where they run.
    """
    if not is_compiled(word, device=device.type):
        return as_it_is
    if word == "triton":
        from parallel.fused_kernels import FUSED_KERNELS  # Triton comes with torch for CUDA

        return _EachOnce(FUSED_KERNELS)
    return _EachOnce({})


class CompilerFailure(RuntimeError):
    """One of torch's compilers has failed; the message is the first line of its own, which has many."""


@cache
def _compiler_errors() -> tuple[type[Exception], ...]:
    """Return what torch's compilers raise where they fail, Triton's own where it is installed."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    errors: tuple[type[Exception], ...] = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
    errors += (FailOnRecompileLimitHit,)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (*errors, TritonError)


@contextmanager
def compiling() -> Iterator[None]:
    """Turn what torch's compilers raise where they fail into a `CompilerFailure`.

    Memory that runs out while a compiled function runs is none: it is raised as it is.
    """
    try:
        yield
    except _compiler_errors() as error:
        if NO_MEMORY.search(str(error)):
            raise
        raise CompilerFailure(next(iter(str(error).splitlines()), type(error).__name__)) from error


def compile_now(
    compiled: Compile,
    *,
    rows: int,
    widths: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    split: bool,
    drops: bool,
    biases: bool,
    activation: Callable[..., Tensor],
) -> None:
    """Compile the functions of `parallel.fused`, called as the layers will, or read what was compiled before.

    Args:
        compiled: What the layers are built with.
        rows: Tokens of a rank's micro-batch.
        widths: Width of the states, and of this rank's part of the feed-forward.
        heads: Heads of this rank, and their width.
        dtype: Type of the states.
        device: Where they are.
        split: Whether the sequence is split: whole parameters then come through `with_summed_gradients`.
        drops: Whether there is dropout: a bias is then added before it.
        biases: Whether linears and norms have biases.
        activation: The model's, of `parallel.fused`.
    """
    (hidden, inner), projected = widths, 3 * heads[0] * heads[1]

    def states(width: int) -> Tensor:
        return torch.zeros(rows, width, dtype=dtype, device=device, requires_grad=True)

    def local(width: int, *, viewed: bool = False) -> Tensor:
        parameter = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        return parameter.view(width) if viewed else parameter

    bias, epsilon = local(hidden, viewed=split) if biases and not drops else None, 1e-5
    norm = (local(hidden, viewed=split), local(hidden, viewed=split) if biases else None, epsilon)
    wide = [x for _ in range(1 + (activation is swiglu)) for x in (states(inner), local(inner) if biases else None)]
    results = [
        compiled(normalize)(states(hidden), *norm),
        *compiled(add_and_normalize)(states(hidden), None, None, *norm),
        *compiled(add_and_normalize)(states(hidden), states(hidden), bias, *norm),
        compiled(add_to_residual)(states(hidden), states(hidden), bias),
        *compiled(split_heads)(states(projected), local(projected) if biases else None, heads[0]),
        compiled(activation)(*wide),
    ]
    torch.autograd.backward(results, [torch.zeros_like(result) for result in results])


def compiling_fault(compile_all: Callable[[], None], *, device: torch.device) -> str | None:
    """Compile, and return what to do on this machine if it cannot; None if it can.

    Args:
        compile_all: What compiles.
        device: For what.
    """
    lacks = missing_compiler(device.type, environ=environment())
    if lacks is not None:
        return lacks
    try:
        with compiling():
            compile_all()
    except CompilerFailure as failure:
        return f"torch's compiler fails ({failure}): repair it"
    return None


class _EachOnce:
    """Compiles each function once, for any number of tokens, unless there is a kernel for it."""

    def __init__(self, kernels: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        self._compiled = dict(kernels)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = _of_any_length(torch.compile(function))
        return self._compiled[function]


def _of_any_length(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled function that another number of tokens, the first dimension, does not compile again."""

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            # Parameters have the same size in each call: their kernels are faster if torch knows it.
            if isinstance(argument, Tensor) and not isinstance(argument, nn.Parameter):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*arguments)

    return run
