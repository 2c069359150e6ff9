"""The functions of `parallel.fused` by Triton kernels, forward and backward; in Triton's interpreter for tests.

The sums over rows that gradients of biases and norms need are made where the gradient of the states is written, so that
it is not read again; only the bias of a block's last linear takes a pass of its own. The residual stream's gradient is
added where a norm's is computed. States have two dimensions here, [tokens, width].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton import next_power_of_2

from parallel import fused, fused_triton

NORM_PROGRAMS = 384  # that share the rows of a norm's backward pass: an A100 runs up to 432 at a time, an H100 528
TILE_ELEMENTS, TILE_PROGRAMS = 2048, 2048  # elements that a program takes at once, and programs that sum columns
TILE_COLUMNS = 256  # of a tile: each warp reads 512 bytes of a row


class _Normalize(Function):
    """States and an output of a linear added up, or the states alone; and the LayerNorm of that."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Tensor | None,
        output_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        (rows, width), x = x.shape, x.contiguous()
        added = x.view_as(x) if output is None else torch.empty_like(x)
        normalized, moments = torch.empty_like(x), x.new_empty(rows, 2, dtype=torch.float32)
        block = next_power_of_2(width)
        fused_triton.norm_forward[(rows,)](
            *(x, None if output is None else output.contiguous(), output_bias, weight, bias),
            *(added, normalized, moments, width, epsilon),
            WIDTH=block,
            num_warps=_warps(block // 512),
        )
        ctx.save_for_backward(added, moments, weight)
        ctx.set_materialize_grads(False)
        ctx.adds, ctx.sums = output is not None, 1 + (bias is not None) + (output_bias is not None)
        return added, normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        states, moments, weight = ctx.saved_tensors
        (rows, width), block = states.shape, next_power_of_2(states.shape[1])
        gradient = torch.zeros_like(states) if gradient is None else gradient.contiguous()
        stripes, each = _stripes(rows, programs=NORM_PROGRAMS)
        result, sums = torch.empty_like(states), states.new_empty(stripes, ctx.sums, width, dtype=torch.float32)
        fused_triton.norm_backward[(stripes,)](
            *(gradient, None if kept is None else kept.contiguous(), states, moments, weight, result, sums),
            *(rows, each, width),
            SUMS=ctx.sums,
            WIDTH=block,
            num_warps=_warps(block // 256),
        )
        of_weight, of_bias, of_output_bias = (*_total(sums, weight.dtype), None, None)[:3]
        return result, result if ctx.adds else None, of_output_bias, of_weight, of_bias, None


class _Add(Function):
    """States, a linear's output and its bias added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        rows, width = x.shape
        out, (lines, columns) = torch.empty_like(x, memory_format=torch.contiguous_format), _tile(width)
        grid = (-(-rows // lines), -(-width // columns))
        fused_triton.residual_forward[grid](
            *(x.contiguous(), output.contiguous(), bias, out, rows, width), ROWS=lines, COLUMNS=columns
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.bias_dtype is None:
            return gradient, gradient, None
        gradient = gradient.contiguous()
        (rows, width), (lines, columns) = gradient.shape, _tile(gradient.shape[1])
        blocks = -(-width // columns)
        stripes, each = _stripes(rows, programs=TILE_PROGRAMS // blocks, multiple=lines)
        sums = gradient.new_empty(stripes, width, dtype=torch.float32)
        fused_triton.column_sums[(stripes, blocks)](gradient, sums, rows, each, width, ROWS=lines, COLUMNS=columns)
        return gradient, gradient, _total(sums, ctx.bias_dtype)


class _Gelu(Function):
    """The GELU of a linear's output and its bias."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
        (rows, width), up = up.shape, up.contiguous()
        out, (lines, columns) = torch.empty_like(up), _tile(width)
        grid = (-(-rows // lines), -(-width // columns))
        fused_triton.gelu_forward[grid](up, bias, out, rows, width, EXACT=exact, ROWS=lines, COLUMNS=columns)
        ctx.save_for_backward(up, bias)
        ctx.exact = exact
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        up, bias = ctx.saved_tensors
        (rows, width), (lines, columns) = up.shape, _tile(up.shape[1])
        blocks = -(-width // columns)
        stripes, each = _stripes(rows, programs=TILE_PROGRAMS // blocks, multiple=lines)
        result, sums = torch.empty_like(up), None if bias is None else up.new_empty(stripes, width, dtype=torch.float32)
        fused_triton.gelu_backward[(stripes, blocks)](
            *(gradient.contiguous(), up, bias, result, sums, rows, each, width),
            EXACT=ctx.exact,
            ROWS=lines,
            COLUMNS=columns,
        )
        return result, None if sums is None else _total(sums, bias.dtype), None


class _SwiGLU(Function):
    """The SiLU of one linear's output and its bias times another's output and its bias."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> Tensor:
        (rows, width), gate, up = up.shape, gate.contiguous(), up.contiguous()
        out, (lines, columns) = torch.empty_like(up), _tile(width)
        grid = (-(-rows // lines), -(-width // columns))
        fused_triton.swiglu_forward[grid](
            *(gate, gate_bias, up, up_bias, out, rows, width), ROWS=lines, COLUMNS=columns
        )
        ctx.save_for_backward(gate, gate_bias, up, up_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_bias, up, up_bias = ctx.saved_tensors
        (rows, width), (lines, columns) = up.shape, _tile(up.shape[1])
        blocks = -(-width // columns)
        stripes, each = _stripes(rows, programs=TILE_PROGRAMS // blocks, multiple=lines)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        sums = tuple(
            None if bias is None else up.new_empty(stripes, width, dtype=torch.float32) for bias in (gate_bias, up_bias)
        )
        fused_triton.swiglu_backward[(stripes, blocks)](
            *(gradient.contiguous(), gate, gate_bias, up, up_bias, of_gate, of_up, *sums, rows, each, width),
            ROWS=lines,
            COLUMNS=columns,
        )
        of_gate_bias, of_up_bias = (None if total is None else _total(total, up.dtype) for total in sums)
        return of_gate, of_gate_bias, of_up, of_up_bias


class _SplitHeads(Function):
    """Queries, keys and values in a piece each, with the projection's bias."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, ...]:
        rows, head_dim = len(qkv), qkv.shape[1] // (3 * heads)
        width, lines = _head_tile(head_dim)
        parts = tuple(qkv.new_empty(rows, heads, head_dim) for _ in range(3))
        fused_triton.heads_forward[(-(-rows // lines), heads)](
            *(qkv.contiguous(), bias, *parts, rows, heads, head_dim), ROWS=lines, WIDTH=width
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, heads, head_dim = gradients[0].shape
        width, lines = _head_tile(head_dim)
        stripes, each = _stripes(rows, programs=TILE_PROGRAMS // heads, multiple=lines)
        result = gradients[0].new_empty(rows, 3 * heads * head_dim)
        sums = None if ctx.bias_dtype is None else result.new_empty(stripes, result.shape[1], dtype=torch.float32)
        fused_triton.heads_backward[(stripes, heads)](
            *(*(gradient.contiguous() for gradient in gradients), result, sums, rows, each, heads, head_dim),
            ROWS=lines,
            WIDTH=width,
        )
        return result, None if sums is None else _total(sums, ctx.bias_dtype), None


def _total(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of all stripes, [...] of [stripes, ...], in a parameter's type."""
    return sums.sum(0).to(dtype)


def _stripes(rows: int, *, programs: int, multiple: int = 1) -> tuple[int, int]:
    """Return into how many stripes rows are split, and the rows of each, a multiple of what is taken at once."""
    each = max(1, -(-rows // max(1, programs) // multiple)) * multiple
    return -(-rows // each), each


def _tile(width: int) -> tuple[int, int]:
    """Return the rows and columns that a program takes at once of rows of a width."""
    columns = min(TILE_COLUMNS, next_power_of_2(width))
    return TILE_ELEMENTS // columns, columns


def _head_tile(head_dim: int) -> tuple[int, int]:
    """Return the dims, at least a head's, and the rows that a program takes at once."""
    width = next_power_of_2(head_dim)
    return width, max(1, TILE_ELEMENTS // 2 // width)


def _warps(wanted: int) -> int:
    """Return how many warps a program gets, a power of two from 4 to 32."""
    return min(32, max(4, wanted))


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    normalized: Tensor = _Normalize.apply(x, None, None, weight, bias, epsilon)[1]  # type: ignore[no-untyped-call]
    return normalized


def _gelu_tanh(up: Tensor, bias: Tensor | None) -> Tensor:
    return _Gelu.apply(up, bias, False)  # type: ignore[no-any-return,no-untyped-call]


def _gelu_exact(up: Tensor, bias: Tensor | None) -> Tensor:
    return _Gelu.apply(up, bias, True)  # type: ignore[no-any-return,no-untyped-call]


FUSED_KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    fused.normalize: _normalize,
    fused.add_and_normalize: _Normalize.apply,
    fused.add_to_residual: _Add.apply,
    fused.split_heads: _SplitHeads.apply,
    fused.gelu_tanh: _gelu_tanh,
    fused.gelu_exact: _gelu_exact,
    fused.swiglu: _SwiGLU.apply,
}
"""What takes the place of a function of `parallel.fused`, called alike but for keywords."""
