"""Biases that are given by a number at each distance, and their strips."""

import torch
from torch import Tensor, nn

from parallel.axes import Group
from parallel.parameter import Shard
from parallel.shards import declare
from training.model.positions.bias import Bias, padded
from training.model.windows import LosslessWindows


def strip_of(by_distance: Tensor, *, rows: int, keys: int) -> Tensor:
    """Return the bias of a sequence's last queries on its keys.

    Args:
        by_distance: The bias at each distance, [local_heads, distances]; further keys are not seen.
        rows: Queries.
        keys: Length of the sequence, at least `distances`.
    Returns:
        [1, local_heads, rows, keys], -inf where the key is not seen.
    """
    # Row r, column first + c needs distance keys - rows + r - c. Write one line of all distances, the longest
    # first, then the keys ahead. Repeat this line of width + 1 elements and cut it into rows of `width`: each
    # row is then the row above, shifted right by one.
    first, (heads, distances) = padded(rows - 1), by_distance.shape
    width, before = first + padded(keys), first - (rows - 1) + keys - distances
    other = by_distance.new_full((heads, width + 1 - distances), -torch.inf)
    line = torch.cat([other[:, :before], by_distance.flip(1), other[:, before:]], dim=1)  # [heads, width + 1]
    repeated = line[:, None, :].expand(-1, rows, -1).reshape(heads, rows * (width + 1))
    return repeated[:, : rows * width].view(heads, rows, width)[None, :, :, first : first + keys]


class DistanceBias(nn.Module):
    """The bias of this tensor rank's heads, the same for all layers.

    The strip is built in each call: if it is learned, its gradient belongs to one forward pass.
    """

    local_slopes: Tensor | None = None
    learned = False
    causal_only = False
    lossless: LosslessWindows | None = None
    window: int | None = None

    def slope_of(self, device: torch.device) -> None:
        """Return None: there are no slopes."""

    def by_distance(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the bias at each distance from 0 to count - 1, [local_heads, count], in fp32 or wider."""
        raise NotImplementedError

    def forward(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads, rows, keys], -inf where the key is not seen."""
        wide = torch.promote_types(torch.float32, dtype)  # a GPU asks for 16 bits: rounded once, at the end
        by_distance = self.by_distance(min(keys, self.window or keys), device=device, dtype=wide).to(dtype)
        return strip_of(by_distance, rows=rows, keys=keys)


class LearnedBias(DistanceBias):
    """One whose numbers come from a learned table with a row per head.

    Attributes:
        weight: This tensor rank's rows, [local_heads, entries].
    """

    learned = True

    def __init__(self, table: Shard | None, *, tensor: Group) -> None:
        """Take the table's declaration; its values are set later."""
        assert table is not None, "a learned bias has a table"
        super().__init__()
        heads, entries = table.shape
        self.weight = nn.Parameter(torch.empty(heads // tensor.size, entries))
        declare(self.weight, table)


class CalledOnce:
    """A learned bias that calls its module once for several sequences, such as the documents of a micro-batch.

    ZeRO-3 gathers parameters in collectives, ahead of modules in the order in which they were called before: all data
    ranks must make the same calls, and each has other documents.
    """

    local_slopes: Tensor | None = None
    learned, causal_only = True, False

    def __init__(self, bias: Bias, *, longest: int) -> None:
        """Take a bias.

        Args:
            bias: The bias.
            longest: Tokens of the longest sequence.
        """
        self.lossless, self.window = bias.lossless, bias.window
        self._bias, self._distances = bias, min(longest, bias.window or longest)
        self._by_distance: Tensor | None = None

    def slope_of(self, device: torch.device) -> None:
        """Return None: there are no slopes."""

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the strip [1, local_heads, rows, keys]; the device and the type are those of the first call."""
        if self._by_distance is None:
            row = self._bias(rows=1, keys=self._distances, device=device, dtype=dtype)  # of the last query
            self._by_distance = row[0, :, 0].flip(1)
        return strip_of(self._by_distance[:, : min(keys, self._distances)], rows=rows, keys=keys)
