"""Watch what attention is given while a model runs, without changing what it computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from parallel.documents import Documents
from training.model.attention import Attention, AttentionBlock

# called with the place of the block, its queries and its keys
SeeAttention = Callable[[int, Tensor, Tensor], None]


class _Observed:
    """An attention whose queries and keys are seen before it computes."""

    def __init__(self, attend: Attention, see: Callable[[Tensor, Tensor], None]) -> None:
        self.attend, self.bias, self._see = attend, attend.bias, see

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        assert documents is None, "what is seen is one document"
        self._see(q, k)
        return self.attend(q, k, v)


@contextmanager
def observed_attention(blocks: Sequence[AttentionBlock], see: SeeAttention) -> Iterator[None]:
    """Call a function whenever one of the blocks computes attention.

    Args:
        blocks: All blocks, in order.
        see: Called with the block's place among them, queries [batch, heads, queries, head_dim], which are the last
            positions of the keys, and keys [batch, heads, keys, head_dim], both as the scores are made of them.
    """
    kernels = [block.attend for block in blocks]
    for layer, block in enumerate(blocks):
        block.attend = _Observed(kernels[layer], partial(see, layer))
    try:
        yield
    finally:
        for block, kernel in zip(blocks, kernels, strict=True):
            block.attend = kernel
