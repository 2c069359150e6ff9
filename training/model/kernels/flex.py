"""Attention by torch's FlexAttention, compiled on a GPU; the bias is computed inside the kernel."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.kernels.sdpa import Sdpa
from training.model.positions.bias import Bias

TILE = 128  # queries and keys of one block of the mask
FEWEST_TILES = 2  # torch compiles again for a size of 1


class Flex:
    """FlexAttention; no tensor holds a bias, and its slopes come from the number of the head.

    Sequences are padded to whole tiles: at other lengths compiled FlexAttention has given NaN gradients
    (pytorch#153799), and one compilation then serves all lengths.

    Attributes:
        bias: The bias.
        options: What FlexAttention is told about its kernel.
    """

    # All lengths are whole tiles, which a compilation for many lengths cannot know.
    options: ClassVar[dict[str, Any]] = {"IS_DIVISIBLE": True}

    def __init__(self, bias: Bias, *, compiled: bool | None = None) -> None:
        """Take a bias.

        Args:
            bias: One whose slopes are a function of the head.
            compiled: Whether to compile the kernel; by default, on a GPU only. On a CPU it has no backward pass.
        """
        self.bias, self._compiled, self._one_query = bias, compiled, Sdpa(bias)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]; a single query after a cache is left to SDPA."""
        queries, keys = q.shape[2], k.shape[2]
        if queries == 1 < keys:
            return self._one_query(q, k, v)
        tiles = max(FEWEST_TILES, -(-keys // TILE))
        end = tiles * TILE - keys
        # Queries after a cache take their own places in the sequence; the rows before them are not used.
        q, k, v = _padded(q, keys - queries, end), _padded(k, 0, end), _padded(v, 0, end)
        compiled = q.is_cuda if self._compiled is None else self._compiled
        out: Tensor = flex_kernel(compiled)(
            q,
            k,
            v,
            score_mod=penalty(self.bias.slope_of(q.device)),
            block_mask=causal_mask(tiles, device=q.device),
            kernel_options=self.options,
        )
        return out if end == 0 and queries == keys else out[:, :, keys - queries : keys]


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (0, 0, before, after)) if before or after else x


def penalty(slope_of: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor] | None:
    """Return the score function of a bias: score, batch, head, query, key -> score; None for the score itself.

    Args:
        slope_of: Slopes by this rank's number of a head.
    """
    if slope_of is None:
        return None

    def penalized(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slope_of(head) * (query - key)

    return penalized


@lru_cache(maxsize=2)
def flex_kernel(compiled: bool) -> Any:
    """Return FlexAttention; compiled, it fails where torch cannot compile it, instead of computing all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # torch compiles a function for 8 kinds of arguments, and all models of a process share this one: allow as many as
    # torch ever does.
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit
    return torch.compile(flex_attention, fullgraph=True)


@lru_cache(maxsize=16)
def causal_mask(tiles: int, *, device: torch.device) -> Any:
    """Return the causal mask of whole tiles, a BlockMask: a tile on the diagonal is masked, those before it are not.

    torch's `create_block_mask` finds the same by a compiled kernel, or in memory of [queries, keys].
    """
    from torch.nn.attention.flex_attention import BlockMask

    row = torch.arange(tiles, dtype=torch.int32, device=device)
    # Row r: one masked tile, number r, and r whole tiles, from 0 on. Entries beyond these counts are not read.
    return BlockMask.from_kv_blocks(
        torch.ones_like(row)[None, None],
        row[:, None].expand(-1, tiles).contiguous()[None, None],
        row[None, None],
        row.expand(tiles, -1).contiguous()[None, None],
        BLOCK_SIZE=TILE,
        mask_mod=_seen,
    )


def _seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
