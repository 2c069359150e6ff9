"""Finds the first tile with weight of each row of tiles by looking at scores, on a GPU.

`windows.first_keys_with_weight` says how. Here nothing waits for the host: each row of tiles looks for itself, and its
nearest tiles give the sums of weights that the others are measured by.
"""

import math
from typing import Any

import torch
from torch import Tensor

from training.model.windows import SEARCH_PART, share_limit

NEAREST_TILES = 4  # whose weights bound a query's sum of weights
_NARROWEST = 16  # numbers that Triton multiplies at least
# In the terms of torch's schemas: not every version reads them from the types below.
_SCHEMA = "(Tensor q, Tensor k, Tensor radius, Tensor slopes, int? window, Tensor? starts, int tile) -> Tensor"


@torch.library.custom_op("trainshort::first_tiles_with_weight", mutates_args=(), schema=_SCHEMA)
def first_tiles_with_weight(
    q: Tensor, k: Tensor, radius: Tensor, slopes: Tensor, window: int | None, starts: Tensor | None, tile: int
) -> Tensor:
    """Return the first tile that each row of tiles needs, [batch, local_heads, tiles] int32, at most its own.

    A Triton kernel: on a GPU, and in Triton's interpreter for tests.

    Args:
        q: [batch, local_heads, tiles * tile, head_dim] of 16 bits, zero where there is no query.
        k: Like q.
        radius: Largest norm of a key in the tiles before each, [batch, local_heads, tiles] fp32.
        slopes: [local_heads] fp32.
        window: Keys that a query sees, its own included; None for all before it.
        starts: Place of the first token of each token's document, [batch, tiles * tile]; None for one document.
        tile: Queries of a tile, and its keys.
    """
    from training.model.kernels.tile_search_triton import search  # Triton comes with torch's builds for CUDA

    batch, heads, length, head_dim = q.shape
    first = torch.empty(radius.shape, dtype=torch.int32, device=q.device)
    # Logarithms of geometric series: of the weights of all keys from one on, and of as many as a tile has.
    endless = -(-torch.expm1(-slopes)).log()
    series = torch.stack([slopes, endless, endless + (-torch.expm1(-slopes * tile)).log()])
    search[(length // tile, batch * heads)](
        *(q, k, radius.contiguous(), series, starts, first),
        *(*q.stride()[:3], *k.stride()[:3], heads, length if window is None else window),
        *(head_dim**-0.5, math.log(SEARCH_PART * share_limit(q.dtype))),
        HEAD_DIM=head_dim,
        WIDTH=max(_NARROWEST, 1 << (head_dim - 1).bit_length()),
        TILE=tile,
        NEAREST=NEAREST_TILES,
        num_warps=8,
        num_stages=1,  # a loop that may stop early gains nothing from more, and small cards lack the shared memory
    )
    return first


@first_tiles_with_weight.register_fake
def _(q: Tensor, k: Tensor, radius: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(radius, dtype=torch.int32)
