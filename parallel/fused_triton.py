"""Triton kernels of `fused_kernels`: they read states once and write them once, and sum rows on the way.

Rows are tokens, and all tensors are contiguous. Sums are taken in fp32: a program adds up the rows of a stripe, and
stores its sums as one row of [stripes, ...]. Places have 64 bits, as a large micro-batch has 2^31 elements.
"""

import math

import triton
import triton.language as tl

_INNER = tl.constexpr(2 * math.sqrt(2 / math.pi))  # of the tanh form, doubled: (1 + tanh(u)) / 2 = sigmoid(2 u)
_CUBIC = tl.constexpr(0.044715)
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def norm_forward(
    x, output, output_bias, weight, bias, added, normalized, moments, width, epsilon, WIDTH: tl.constexpr
):  # fmt: skip
    """Store a row's sum, unless there is no output, its LayerNorm, and its mean and inverse standard deviation."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, places = columns < width, row * width + columns
    state = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if output is not None:
        state += tl.load(output + places, mask=inside, other=0.0).to(tl.float32)
        if output_bias is not None:
            state += tl.load(output_bias + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = state.to(added.dtype.element_ty)
        tl.store(added + places, rounded, mask=inside)
        state = rounded.to(tl.float32)  # the backward pass has only this
    mean = tl.sum(state, 0) / width
    centered = tl.where(inside, state - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 0) / width + epsilon)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, scale)
    out = centered * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normalized + places, out.to(normalized.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def norm_backward(
    gradient, kept, states, moments, weight, result, sums, rows, each, width,
    SUMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a stripe's gradients of the states, and its sums: of the weight's, the bias's and the output bias's.

    `gradient` is the LayerNorm's, `kept` the states' own, if any; of the three sums the first SUMS are made.
    """
    stripe, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside = columns < width
    of_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros([WIDTH], tl.float32)
    second, third = first, first
    start = stripe * each
    for row in range(start, tl.minimum(start + each, rows)):
        places = tl.cast(row, tl.int64) * width + columns
        mean = tl.load(moments + 2 * tl.cast(row, tl.int64))
        scale = tl.load(moments + 2 * tl.cast(row, tl.int64) + 1)
        of_row = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        state = tl.load(states + places, mask=inside, other=0.0).to(tl.float32)
        normal = (state - mean) * scale
        weighted = of_row * of_weight
        along, level = tl.sum(weighted * normal, 0) / width, tl.sum(weighted, 0) / width
        out = (weighted - level - normal * along) * scale
        if kept is not None:
            out += tl.load(kept + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + places, out.to(result.dtype.element_ty), mask=inside)
        first += of_row * normal
        if SUMS > 1:
            second += of_row
        if SUMS > 2:
            third += out
    sums += tl.cast(stripe, tl.int64) * SUMS * width + columns
    tl.store(sums, first, mask=inside)
    if SUMS > 1:
        tl.store(sums + width, second, mask=inside)
    if SUMS > 2:
        tl.store(sums + 2 * width, third, mask=inside)


@triton.jit
def _tile(start, end, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the places of a program's tile from a row on, which of them are in the matrix, and its columns."""
    lines, columns = start + tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return lines.to(tl.int64) * width + columns, (lines < end) & (columns < width), columns


@triton.jit(do_not_specialize=["rows"])
def residual_forward(x, output, bias, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of the sum."""
    places, inside, columns = _tile(tl.program_id(0) * ROWS, rows, width, ROWS, COLUMNS)
    total = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(output + places, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def column_sums(values, sums, rows, each, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the sums of a stripe's columns."""
    start = tl.program_id(0) * each
    end, total = tl.minimum(start + each, rows), tl.zeros([ROWS, COLUMNS], tl.float32)
    for line in range(start, end, ROWS):
        places, inside, _ = _tile(line, end, width, ROWS, COLUMNS)
        total += tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    _store_sums(sums, total, width, COLUMNS)


@triton.jit
def _store_sums(sums, total, width, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + columns, tl.sum(total, 0), mask=columns < width)


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """Return the GELU and its derivative."""
    if EXACT:
        share = 0.5 * (1 + tl.erf(x * _ROOT_HALF))
        rise = tl.exp(-0.5 * x * x) * _DENSITY
    else:
        square = x * x
        share = 1 / (1 + tl.exp(-x * (square * _CUBIC + 1) * _INNER))
        rise = share * (1 - share) * (square * 3 * _CUBIC + 1) * _INNER
    return x * share, share + x * rise


@triton.jit
def _inputs(up, bias, places, inside, columns, width):
    x = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def gelu_forward(up, bias, out, rows, width, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of the GELU of a linear's output and its bias."""
    places, inside, columns = _tile(tl.program_id(0) * ROWS, rows, width, ROWS, COLUMNS)
    value, _ = _gelu(_inputs(up, bias, places, inside, columns, width), EXACT)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def gelu_backward(
    gradient, up, bias, result, sums, rows, each, width,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a stripe's gradients of the linear's output, and their sums if there is a bias."""
    start = tl.program_id(0) * each
    end, total = tl.minimum(start + each, rows), tl.zeros([ROWS, COLUMNS], tl.float32)
    for line in range(start, end, ROWS):
        places, inside, columns = _tile(line, end, width, ROWS, COLUMNS)
        _, slope = _gelu(_inputs(up, bias, places, inside, columns, width), EXACT)
        out = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(result + places, out.to(result.dtype.element_ty), mask=inside)
        total += out
    if sums is not None:
        _store_sums(sums, total, width, COLUMNS)


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward(gate, gate_bias, up, up_bias, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of one linear's SiLU times the other's output, each with its bias."""
    places, inside, columns = _tile(tl.program_id(0) * ROWS, rows, width, ROWS, COLUMNS)
    x = _inputs(gate, gate_bias, places, inside, columns, width)
    value = x / (1 + tl.exp(-x)) * _inputs(up, up_bias, places, inside, columns, width)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def swiglu_backward(
    gradient, gate, gate_bias, up, up_bias, of_gate, of_up, gate_sums, up_sums, rows, each, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a stripe's gradients of both linears' outputs, and the sums of those that have a bias."""
    start = tl.program_id(0) * each
    end, gate_total = tl.minimum(start + each, rows), tl.zeros([ROWS, COLUMNS], tl.float32)
    up_total = gate_total
    for line in range(start, end, ROWS):
        places, inside, columns = _tile(line, end, width, ROWS, COLUMNS)
        x = _inputs(gate, gate_bias, places, inside, columns, width)
        factor = _inputs(up, up_bias, places, inside, columns, width)
        share = 1 / (1 + tl.exp(-x))
        given = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        gate_part, up_part = given * factor * share * (1 + x * (1 - share)), given * x * share
        tl.store(of_gate + places, gate_part.to(of_gate.dtype.element_ty), mask=inside)
        tl.store(of_up + places, up_part.to(of_up.dtype.element_ty), mask=inside)
        gate_total += gate_part
        up_total += up_part
    if gate_sums is not None:
        _store_sums(gate_sums, gate_total, width, COLUMNS)
    if up_sums is not None:
        _store_sums(up_sums, up_total, width, COLUMNS)


@triton.jit
def _head_tile(start, end, heads, head_dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return where a head's dims of some rows are in a tensor of heads and in the projection's output, and which are.

    The second are those of the queries; the head's keys and values follow them in each row.
    """
    head, dims = tl.program_id(1), tl.arange(0, WIDTH)[None, :]
    lines = (start + tl.arange(0, ROWS))[:, None]
    place = lines.to(tl.int64) * heads + head
    return place * head_dim + dims, place * 3 * head_dim + dims, (lines < end) & (dims < head_dim)


@triton.jit(do_not_specialize=["rows"])
def heads_forward(qkv, bias, q, k, v, rows, heads, head_dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store one head's queries, keys and values of some rows."""
    apart, together, inside = _head_tile(tl.program_id(0) * ROWS, rows, heads, head_dim, ROWS, WIDTH)
    if bias is not None:
        bias += tl.program_id(1) * 3 * head_dim
    _move(qkv + together, bias, q + apart, inside, head_dim, 0, WIDTH)
    _move(qkv + together, bias, k + apart, inside, head_dim, 1, WIDTH)
    _move(qkv + together, bias, v + apart, inside, head_dim, 2, WIDTH)


@triton.jit
def _move(source, bias, target, inside, head_dim, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Store one of a head's three parts, with its bias."""
    values = tl.load(source + PART * head_dim, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        dims = tl.arange(0, WIDTH)
        values += tl.load(bias + PART * head_dim + dims, mask=dims < head_dim, other=0.0).to(tl.float32)[None, :]
    tl.store(target, values.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def heads_backward(
    q, k, v, result, sums, rows, each, heads, head_dim,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a stripe's gradients of one head as the projection's output has them, and their sums if there is a bias."""
    start = tl.program_id(0) * each
    end = tl.minimum(start + each, rows)
    of_q = tl.zeros([ROWS, WIDTH], tl.float32)
    of_k, of_v = of_q, of_q
    for line in range(start, end, ROWS):
        apart, together, inside = _head_tile(line, end, heads, head_dim, ROWS, WIDTH)
        of_q += _moved(q + apart, result + together, inside, head_dim, 0)
        of_k += _moved(k + apart, result + together, inside, head_dim, 1)
        of_v += _moved(v + apart, result + together, inside, head_dim, 2)
    if sums is not None:
        dims = tl.arange(0, WIDTH)
        inside = dims < head_dim
        sums += (tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)) * 3 * head_dim + dims
        tl.store(sums, tl.sum(of_q, 0), mask=inside)
        tl.store(sums + head_dim, tl.sum(of_k, 0), mask=inside)
        tl.store(sums + 2 * head_dim, tl.sum(of_v, 0), mask=inside)


@triton.jit
def _moved(source, target, inside, head_dim, PART: tl.constexpr):
    """Store a part's gradients, and return them."""
    values = tl.load(source, mask=inside, other=0.0)
    tl.store(target + PART * head_dim, values.to(target.dtype.element_ty), mask=inside)
    return values.to(tl.float32)
