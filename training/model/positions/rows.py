"""Rows of a table of positions, where the first position is a number or is read from the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.documents import Places
from training.model.positions.bias import power_of_two


class NextPosition:
    """The position of one new token as a tensor, so that a captured graph reads it at each replay.

    Attributes:
        index: The position, [1] int64.
        limit: All positions are below it: the length of the tables.
    """

    def __init__(self, *, limit: int, device: torch.device) -> None:
        self.index, self.limit = torch.zeros(1, dtype=torch.long, device=device), limit
        self._tables: dict[int, Tensor] = {}

    def row_of(self, table: Tensor) -> Tensor:
        """Return the position's row of a table [limit, ...], [1, ...]."""
        # Keep the table: a graph reads its memory at each replay, and a cache of tables may let go of it.
        self._tables[table.data_ptr()] = table
        return table.index_select(0, self.index)


Start = int | NextPosition | Places


def rows_of(table: Callable[[int], Tensor], *, start: Start, count: int) -> Tensor:
    """Return the rows of consecutive positions, [count, ...]; of places, [count, batch, ...].

    Args:
        table: Returns the rows of positions from 0 to a length; called with powers of two, so that it may keep them.
        start: The first position, or all of them.
        count: Number of positions; one, if the start is read from the device.
    """
    if isinstance(start, int):
        return table(power_of_two(start + count))[start : start + count]
    return start.row_of(table(power_of_two(start.limit)))
