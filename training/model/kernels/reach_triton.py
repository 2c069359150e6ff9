"""`windows.reach` in Triton, for kernels that find windows themselves."""

import triton
import triton.language as tl

from training.model.windows import RELATIVE_SLACK, SLACK

_RELATIVE_SLACK, _SLACK = tl.constexpr(RELATIVE_SLACK), tl.constexpr(SLACK)


@triton.jit
def keys_in_reach(largest, sums, endless, limit, slope, behind):
    """Return how many keys before a query's own have weight, at most `behind`; of a query or of several.

    `largest` is the largest score of a key but for its distance, `endless` the logarithm of the sum of exp(-slope
    distance) over all distances, `limit` that of the share that may be left out.
    """
    distance = (largest * (1 + _RELATIVE_SLACK) - sums + endless - limit + _SLACK) / slope
    is_nearer = distance < behind  # what is no number takes all
    needed = tl.where(is_nearer, tl.maximum(tl.ceil(distance), 0.0), 0.0).to(tl.int32)
    return tl.where(is_nearer, needed, behind)
