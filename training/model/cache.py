"""Keys and values of the tokens so far, so that the next token costs one query."""

from typing import Protocol

import torch
from torch import Tensor

from training.model.attention import Attention
from training.model.kernels.sdpa import attend_next
from training.model.positions.rows import Start
from training.model.windows import norms

LONG_CACHE = 4096  # keys from which on a window for each head takes less time than all keys in one call
ROOM = 256  # tokens that fit after a prompt: most generations are shorter and copy nothing


class Cache(Protocol):
    """What a decoder asks of a cache while it adds new tokens to it."""

    @property
    def start(self) -> Start:
        """Position of the first new token."""
        ...

    def places(self, first: int, count: int) -> Start:
        """Return the position of `count` new tokens, from number `first` on, for what is added to their embeddings."""
        ...

    def attend(self, attend: Attention, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of new tokens to all tokens so far, themselves included.

        Args:
            attend: The attention.
            block: Number of the block.
            q: [batch, heads, new, head_dim].
            k: Like q.
            v: Like q.
        Returns:
            [batch, heads, new, head_dim].
        """
        ...

    def advance(self, tokens: int) -> None:
        """Count new tokens, once all blocks have seen them."""
        ...


class KeyValueCache:
    """One growing pair of buffers, of keys and of values, per block.

    Attributes:
        length: Tokens that every block has seen.
        pairs: The buffers by the number of the block, [batch, heads, size, head_dim] each; the first `length` are set.
        radii: Largest norm of a key by the number of the block, [batch, heads, 1], where windows are on. What decodes
            with fixed shapes measures it when it takes the tokens over, and raises it itself.
    """

    def __init__(self) -> None:
        self.length = 0
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.radii: dict[int, Tensor] = {}

    @property
    def start(self) -> int:
        """Position of the next token."""
        return self.length

    def places(self, first: int, count: int) -> int:
        """Return the position of the new token of number `first`; the others follow it."""
        return self.length + first

    def attend(self, attend: Attention, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add new tokens' keys and values of one block, and attend to all so far; see `Cache`."""
        keys, values = self.extend(block, k, v)
        if attend.bias.lossless is None or attend.bias.window is not None:
            return attend(q, keys, values)
        radius = norms(k.detach()).amax(2, keepdim=True)
        if block in self.radii:  # in place: what decodes with fixed shapes holds it
            torch.maximum(radius, self.radii[block], out=self.radii[block])
        else:
            self.radii[block] = radius
        if q.shape[2] > 1 or keys.shape[2] < LONG_CACHE or q.is_cuda:
            return attend(q, keys, values)
        return attend_next(q, keys, values, bias=attend.bias, radius=self.radii[block])

    def repeated(self, counts: Tensor) -> "KeyValueCache":
        """Return a cache of its own in which each row of the batch stands so often, for several continuations of it.

        Args:
            counts: How often each row stands there, [batch] int64, on the CPU.
        """
        copy = KeyValueCache()
        copy.length = self.length
        keys, _ = next(iter(self.pairs.values()))
        # Found on the CPU, once: a GPU would be waited for, to learn how many they are.
        rows = torch.arange(len(counts)).repeat_interleave(counts).to(keys.device)
        copy.pairs = {block: (keys[rows], values[rows]) for block, (keys, values) in self.pairs.items()}
        copy.radii = {block: radius[rows] for block, radius in self.radii.items()}
        return copy

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens' keys and values of one block; return all of them so far.

        Args:
            block: Number of the block.
            k: [batch, heads, new, head_dim].
            v: Like k.
        Returns:
            Keys and values [batch, heads, length + new, head_dim].
        """
        end = self.length + k.shape[2]
        pair = self.pairs.get(block)
        if pair is None or pair[0].shape[2] < end:
            # Double the size to grow: copies then cost amortized constant time per token.
            size = max(end + ROOM, 0 if pair is None else 2 * pair[0].shape[2])
            pair = (_grown(pair and pair[0], like=k, size=size), _grown(pair and pair[1], like=v, size=size))
            self.pairs[block] = pair
        for stored, new in zip(pair, (k, v), strict=True):
            stored[:, :, self.length : end] = new
        return pair[0][:, :, :end], pair[1][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count new tokens, once all blocks have seen them."""
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget the tokens after the first `length`: others can then follow these."""
        assert length <= self.length, f"{length} tokens of {self.length}"
        self.length = length  # radii stay bounds of the keys that are left


def _grown(stored: Tensor | None, *, like: Tensor, size: int) -> Tensor:
    batch, heads, _, head_dim = like.shape
    larger = like.new_empty(batch, heads, size, head_dim)
    if stored is not None:
        larger[:, :, : stored.shape[2]] = stored
    return larger
