"""The documents of a micro-batch: where each begins, so that attention and positions stay inside it.

The layers take `Documents` in place of a cache. What a recomputed layer needs is then among its arguments: several
micro-batches are on their way through the stages at a time, and none is the current one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Positions of tokens within their documents.

    Attributes:
        index: The positions, [seq, batch] int64.
        limit: All positions are below it.
    """

    index: Tensor
    limit: int

    def row_of(self, table: Tensor) -> Tensor:
        """Return the positions' rows of a table [at least limit, ...], [seq, batch, ...]."""
        return table[self.index]


class Documents:
    """Where the documents of a micro-batch's inputs begin.

    Attributes:
        lengths: Tokens of each document, by row of the batch.
        starts: Place of the first token of each token's document, [batch, seq] int64, on the device.
    """

    start = 0  # rotations depend on distances alone

    def __init__(self, begins: Tensor, *, device: torch.device) -> None:
        """Find the documents.

        Args:
            begins: Whether an input begins a document, [batch, seq], on the CPU, so that nothing waits for a device.
                The first of a row does in any case.
            device: Where the inputs are.
        """
        batch, seq = begins.shape
        begins = begins != 0
        begins[:, 0] = True
        self.lengths: list[list[int]] = [
            [end - first for first, end in pairwise([*row.nonzero().flatten().tolist(), seq])] for row in begins
        ]
        places = torch.arange(seq).expand(batch, -1)
        self.starts = _sent(places.where(begins, 0).cummax(1).values, device)

    @cached_property
    def ends(self) -> Tensor:
        """Where each document ends if the rows follow each other, behind a 0, [documents + 1] int32."""
        ends = list(accumulate(chain.from_iterable(self.lengths), initial=0))
        return _sent(torch.tensor(ends, dtype=torch.int32), self.starts.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(max(row) for row in self.lengths)

    def places(self, first: int, count: int) -> Places:
        """Return the positions of `count` tokens of each row, from number `first` on."""
        numbers = torch.arange(first, first + count, device=self.starts.device)
        index = (numbers - self.starts[:, first : first + count]).t()
        return Places(index, limit=self.starts.shape[1])

    def attend(self, attend: Callable[..., Tensor], block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of each document to itself.

        Args:
            attend: The attention.
            block: Number of the block.
            q: [batch, local_heads, seq, head_dim].
            k: Like q.
            v: Like q.
        Returns:
            [batch, local_heads, seq, head_dim].
        """
        return attend(q, k, v, self)

    def advance(self, tokens: int) -> None:
        """Do nothing: no token is kept."""


def split_batch(batch: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor, Documents | None]:
    """Return inputs and targets [batch, seq] of a micro-batch, and its documents if it says where they begin.

    Args:
        batch: Tokens [batch, seq + 1]; or [batch, 2, seq + 1] with the tokens and whether each begins a document.
        device: Where the model is.
    """
    tokens, documents = batch.to(device, non_blocking=True), None  # whole: a part of it would be copied first
    if batch.ndim == 3:
        tokens, documents = tokens[:, 0], Documents(batch[:, 1, :-1], device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the CPU on a device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
