"""Seeds by purpose, and initial weights by name and place: the same on every machine and in every layout.

Weights are made of the raw bits of numpy's Philox, a counter-based generator: it draws any range without drawing what
is before it. numpy guarantees these bits on every platform and in every release; `standard_normal` may change.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard, padded_shape, span
from parallel.shards import declared

_VALUES = 1 << 16  # a weight takes 16 random bits, which choose one of so many values
_PER_COUNTER = 16  # weights of one step of Philox's counter, which gives 256 bits
_PANEL = 32  # columns of a row-split matrix that are drawn together
_CHUNK = 1 << 17  # weights that a thread draws at a time: its buffers stay in the processor's cache


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose of a run."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def initial_weights(module: nn.Module, *, seed: int, tensor: Group) -> None:
    """Fill a module's declared parameters with the run's initial weights."""
    for parameter, shard in declared(module).values():
        with torch.no_grad():
            parameter.copy_(initial_slice(shard, seed=seed, tensor=tensor))


def initial_slice(shard: Shard, *, seed: int, tensor: Group) -> Tensor:
    """Return the initial weights of a tensor rank's slice, with its padding of zeros: fp32, on the CPU."""
    shape = padded_shape(shard, tensor_size=tensor.size)
    return initial_range(shard, seed=seed, tensor=tensor, start=0, stop=prod(shape)).view(shape)


def initial_range(shard: Shard, *, seed: int, tensor: Group, start: int, stop: int) -> Tensor:
    """Return the elements [start, stop) of a tensor rank's flat slice; zeros after its end.

    Draws no more than the rows that hold them, in as many threads as torch uses.

    Args:
        shard: The parameter.
        seed: The run's seed.
        tensor: The tensor axis.
        start: First element, of the slice with its padding.
        stop: The element after the last.
    Returns:
        [stop - start], fp32, on the CPU.
    """
    shape = padded_shape(shard, tensor_size=tensor.size)
    width = prod(shape[1:])
    first, last = start // width, -(-stop // width)  # rows of the slice
    values = torch.zeros(last - first, width)
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
        _draw(held.numpy(), shard, key=seed_for(seed, "weights", shard.name), row=row + first, column=column)
    return values.view(-1)[start - first * width : stop - first * width]


def _draw(out: NDArray[np.float32], shard: Shard, *, key: int, row: int, column: int) -> None:
    """Fill `out` with the elements of the whole tensor from (row, column) on, as if its shape were [rows, columns].

    The tensor's numbers are in one stream: panel after panel, and in a panel row after row. A panel has all columns, or
    few if columns are split, so that a tensor rank draws only its own.
    """
    assert shard.init_std is not None
    rows, columns = out.shape
    panel = _PANEL if shard.rule == "row" else columns
    values = (_normal_values() * shard.init_std).astype(np.float32)
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


def _random_bits(key: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Return the numbers [start, stop) of the stream of a key."""
    first, last = start // _PER_COUNTER, -(-stop // _PER_COUNTER)
    generator = np.random.Philox(key=key)
    generator.advance(first)
    words = generator.random_raw(4 * (last - first))
    # little-endian everywhere, so that the numbers do not depend on the machine
    numbers: NDArray[np.uint16] = words.astype("<u8", copy=False).view("<u2")
    return numbers[start - first * _PER_COUNTER : stop - first * _PER_COUNTER]


@lru_cache(maxsize=1)
def _normal_values() -> NDArray[np.float64]:
    """Return the normal distribution's quantile in the middle of each of its equal shares, scaled to a std of 1.

    They reach from -4.17 to 4.17. Each is as likely as the others, so a random index is all that a draw needs.
    """
    quantiles = torch.special.ndtri((torch.arange(_VALUES, dtype=torch.float64) + 0.5) / _VALUES).numpy()
    values: NDArray[np.float64] = quantiles / quantiles.std()
    return values
