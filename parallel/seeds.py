"""Seeds by purpose, and initial weights by name and place: the same on every machine and in every layout.

Weights are made of the raw bits of numpy's Philox, a counter-based generator: it draws any range without drawing what
is before it. numpy guarantees these bits on every platform and in every release; `standard_normal` may change.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard, padded_shape, span
from parallel.philox import philox_bits
from parallel.shards import declared

CPU = torch.device("cpu")

_VALUES = 1 << 16  # a weight takes 16 random bits, which choose one of this many values
_PER_COUNTER = 16  # weights of one step of Philox's counter, which gives 256 bits
_PANEL = 32  # columns of a row-split matrix that are drawn together
_CHUNK = 1 << 17  # weights that a thread draws at a time: its buffers stay in the processor's cache
GPU_CHUNK = 1 << 24  # weights that a GPU draws at a time, in some ten buffers of 8 MB, which stay in its cache too


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose of a run."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def initial_weights(module: nn.Module, *, seed: int, tensor: Group) -> None:
    """Fill a module's declared parameters with the run's initial weights."""
    for parameter, shard in declared(module).values():
        with torch.no_grad():
            parameter.copy_(initial_slice(shard, seed=seed, tensor=tensor, device=parameter.device))


def initial_slice(shard: Shard, *, seed: int, tensor: Group, device: torch.device = CPU) -> Tensor:
    """Return the initial weights of a tensor rank's slice, with its padding of zeros: fp32, on a device."""
    shape = padded_shape(shard, tensor_size=tensor.size)
    return initial_range(shard, seed=seed, tensor=tensor, start=0, stop=prod(shape), device=device).view(shape)


def initial_range(
    shard: Shard, *, seed: int, tensor: Group, start: int, stop: int, device: torch.device = CPU
) -> Tensor:
    """Return the elements [start, stop) of a tensor rank's flat slice; zeros after its end.

    Draws no more than the rows that hold them: on a GPU there, else in as many threads as torch uses. The numbers are
    the same.

    Args:
        shard: The parameter.
        seed: The run's seed.
        tensor: The tensor axis.
        start: First element, of the slice with its padding.
        stop: The element after the last.
        device: Where to draw them.
    Returns:
        [stop - start], fp32, on the device.
    """
    shape = padded_shape(shard, tensor_size=tensor.size)
    width = prod(shape[1:])
    first, last = start // width, -(-stop // width)  # rows of the slice
    values = torch.zeros(last - first, width, device=device)
    row, column, rows = 0, 0, shape[0]
    if shard.dim is not None:
        begin, end = span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
        if shard.dim == 0:
            row, rows = begin, end - begin  # the rest is padding
        else:
            column = begin
    held = values[: max(rows - first, 0)]
    if shard.init_std is None:
        held.fill_(shard.constant)
    else:
        draw = draw_on_cpu if device.type == "cpu" else draw_on_gpu
        draw(held, shard, key=seed_for(seed, "weights", shard.name), row=row + first, column=column)
    return values.view(-1)[start - first * width : stop - first * width]


def draw_on_cpu(held: Tensor, shard: Shard, *, key: int, row: int, column: int) -> None:
    """Fill `held` with the elements of the whole tensor from (row, column) on, as if its shape were [rows, columns].

    The tensor's numbers are in one stream: panel after panel, and in a panel row after row. A panel has all columns, or
    few if columns are split, so that a tensor rank draws only its own.
    """
    assert shard.init_std is not None
    out: NDArray[np.float32] = held.numpy()
    rows, columns = out.shape
    panel = _PANEL if shard.rule == "row" else columns
    values = _normal_values(shard.init_std)
    chunk = max(_CHUNK // panel, 1)

    def fill(place: tuple[int, int]) -> None:
        number, top = place
        bottom = min(top + chunk, rows)
        begin = (number * shard.shape[0] + row + top) * panel
        bits = _random_bits(key, begin, begin + (bottom - top) * panel)
        left = number * panel - column  # of `out`
        drawn = values.take(bits, mode="clip").reshape(bottom - top, panel)
        out[top:bottom, max(left, 0) : left + panel] = drawn[:, max(-left, 0) : columns - left]

    panels = range(column // panel, -(-(column + columns) // panel))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill, product(panels, range(0, rows, chunk))))


def draw_on_gpu(held: Tensor, shard: Shard, *, key: int, row: int, column: int, chunk: int = GPU_CHUNK) -> None:
    """Fill `held` as `draw_on_cpu` does, with tensor operations where it lies, about `chunk` elements at a time."""
    assert shard.init_std is not None
    rows, columns = held.shape
    values = torch.from_numpy(_normal_values(shard.init_std)).to(held.device)
    for top in range(0, rows, at_a_time := max(chunk // columns, 1)):
        part = held[top : top + at_a_time]
        if shard.rule == "row":
            counters, skipped = _counters_of_panels(shard, part, row=row + top, column=column)
            drawn = values[philox_bits(key, counters)].view(len(part), -1)  # whole panels
            part.copy_(drawn[:, skipped : skipped + columns])
        else:
            begin = (row + top) * columns
            first, last = begin // _PER_COUNTER, -(-(begin + part.numel()) // _PER_COUNTER)
            drawn = values[philox_bits(key, torch.arange(first, last, device=held.device))].view(-1)
            part.copy_(drawn[begin - first * _PER_COUNTER :][: part.numel()].view(part.shape))


def _counters_of_panels(shard: Shard, part: Tensor, *, row: int, column: int) -> tuple[Tensor, int]:
    """Return the counters of the panels that hold a part, [rows, panels, counters of a panel's row].

    Also return how many columns of the first panel are before the part.
    """
    rows, columns = part.shape
    place = partial(torch.arange, device=part.device)
    panels = place(column // _PANEL, -(-(column + columns) // _PANEL))
    per_row = _PANEL // _PER_COUNTER
    starts = (panels * shard.shape[0] + place(row, row + rows)[:, None]) * per_row  # [rows, panels]
    return starts[..., None] + place(per_row), column % _PANEL


def _random_bits(key: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Return the numbers [start, stop) of the stream of a key."""
    first, last = start // _PER_COUNTER, -(-stop // _PER_COUNTER)
    generator = np.random.Philox(key=key)
    generator.advance(first)
    words = generator.random_raw(4 * (last - first))
    # little-endian everywhere, so that the numbers do not depend on the machine
    numbers: NDArray[np.uint16] = words.astype("<u8", copy=False).view("<u2")
    return numbers[start - first * _PER_COUNTER : stop - first * _PER_COUNTER]


def _normal_values(std: float) -> NDArray[np.float32]:
    return (_standard_values() * std).astype(np.float32)


@lru_cache(maxsize=1)
def _standard_values() -> NDArray[np.float64]:
    """Return the normal distribution's quantile in the middle of each of its equal shares, scaled to a std of 1.

    They reach from -4.17 to 4.17. Each is as likely as the others, so a random index is all that a draw needs.
    """
    quantiles = torch.special.ndtri((torch.arange(_VALUES, dtype=torch.float64) + 0.5) / _VALUES).numpy()
    values: NDArray[np.float64] = quantiles / quantiles.std()
    return values
