"""Decode the next token with fixed shapes, so that a GPU replays one captured graph instead of many launches.

The buffers of keys and values have a size that is a power of two, and the token's position is a tensor. All of a
step's shapes then depend on the size alone: it is captured once per size, and replayed for each token.
"""

import logging
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from parallel.compiled import compiling
from training.model.attention import Attention, AttentionBlock
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder
from training.model.kernels.next_token import next_attention
from training.model.positions.bias import Bias, power_of_two
from training.model.positions.rows import NextPosition
from training.model.windows import norms

logger = logging.getLogger(__name__)

Launch = Callable[[], Tensor]
Capture = Callable[[Launch], Launch]
SMALLEST = 256  # tokens: smaller buffers would save no time
_WARM_UP = 2  # runs before the capture, which allocate what is made only once


class CudaGraph:
    """The work that a function launches on fixed tensors, captured once; a call replays it and returns its result."""

    _capturing = threading.Lock()  # torch captures on one stream for all threads, and may warm up on the same one

    def __init__(self, run: Launch) -> None:
        """Capture it.

        Raises:
            RuntimeError: the function does what a graph cannot hold.
        """
        with self._capturing:
            self._graph, self._result = _captured(run)

    def __call__(self) -> Tensor:
        """Replay it; the result is overwritten by the next call."""
        self._graph.replay()
        return self._result


def _captured(run: Launch) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    before, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(before)
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UP):
            run()
    before.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
        return graph, run()


class FixedCache:
    """Keys and values in buffers of one size; the position at which a token is added is read from the device.

    Attributes:
        pairs: The buffers by the number of the block, [batch, heads, size, head_dim] each.
        radii: Largest norm of a key by the number of the block, [batch, heads, 1], where keys without weight are left
            out.
        position: Position of the next token.
    """

    def __init__(self, bias: Bias, *, like: KeyValueCache, size: int) -> None:
        """Make empty buffers.

        Args:
            bias: What is added to the scores.
            like: Has buffers of the same blocks.
            size: Tokens that fit.
        """
        # Zeros: the weight of a key that is not yet set is 0, and 0 times what memory happens to hold may be nan.
        self.pairs = {
            block: (_empty(keys, size=size), _empty(values, size=size)) for block, (keys, values) in like.pairs.items()
        }
        self.radii = {block: torch.zeros_like(radius) for block, radius in like.radii.items()}
        keys, _ = next(iter(self.pairs.values()))
        self.position = NextPosition(limit=size, device=keys.device)
        self._attend = next_attention(bias, keys)

    @property
    def start(self) -> NextPosition:
        """Position of the next token."""
        return self.position

    def places(self, first: int, count: int) -> NextPosition:
        """Return the position of the next token, the only new one."""
        return self.position

    def begin(self) -> None:
        """Prepare what the blocks share, once the position is set."""
        self._attend.begin(self.position.index)

    def attend(self, attend: Attention, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of one token to those before it; `attend` itself takes only keys that are set."""
        keys, values = self.pairs[block]
        keys.index_copy_(2, self.position.index, k)
        values.index_copy_(2, self.position.index, v)
        return self._attend(q, keys, values, position=self.position.index, radius=self.radii.get(block))

    def advance(self, tokens: int) -> None:
        """Do nothing: the position is set before each token."""

    def adopt(self, cache: KeyValueCache) -> None:
        """Copy another cache's tokens, and give it these buffers."""
        for block, pair in cache.pairs.items():
            for buffer, filled in zip(self.pairs[block], pair, strict=True):
                buffer[:, :, : cache.length] = filled[:, :, : cache.length]
        for block in cache.radii:  # with smaller buffers, it may not have been raised
            keys, _ = self.pairs[block]
            self.radii[block].copy_(norms(keys[:, :, : cache.length]).amax(2, keepdim=True))
        cache.pairs, cache.radii = dict(self.pairs), dict(self.radii)


def _empty(buffer: Tensor, *, size: int) -> Tensor:
    batch, heads, _, head_dim = buffer.shape
    return buffer.new_zeros(batch, heads, size, head_dim)


class TokenStep:
    """One decoding step of one batch and size, on tensors of its own; one generation uses it at a time.

    Attributes:
        cache: The buffers.
        shape: Batch and size.
    """

    def __init__(self, decoder: Decoder, *, like: KeyValueCache, size: int, capture: Capture) -> None:
        """Build it; the arguments are those of `FixedCache` and `TokenSteps`."""
        attends = {id(layer.attend): layer.attend for layer in decoder.layers if isinstance(layer, AttentionBlock)}
        assert len(attends) == 1, "all blocks share their attention"
        (attend,) = attends.values()
        self.cache = FixedCache(attend.bias, like=like, size=size)
        batch = next(iter(like.pairs.values()))[0].shape[0]
        self.shape = batch, size
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.cache.position.index.device)

        def run() -> Tensor:
            self.cache.begin()
            return decoder.logits(decoder.hidden(self._tokens, self.cache)[-1])

        self._run = capture(run)

    def holds(self, cache: KeyValueCache) -> bool:
        """Return whether a cache's tokens are in this step's buffers, with space for one more."""
        block, pair = next(iter(self.cache.pairs.items()))
        return cache.pairs[block][0] is pair[0] and cache.length < pair[0].shape[2]

    def __call__(self, tokens: Tensor, *, position: int) -> Tensor:
        """Return the logits [batch, vocab] after tokens [batch, 1] at a position; the next call overwrites them."""
        self._tokens.copy_(tokens)
        self.cache.position.index.fill_(position)
        return self._run()


class TokenSteps:
    """The steps of a model: one per text that is generated, and one that is kept for the next text.

    A step is used only at its own batch and size, so that a text does not depend on those before it.
    """

    def __init__(self, decoder: Decoder, *, capture: Capture) -> None:
        """Build it.

        Args:
            decoder: The model, with its weights.
            capture: Returns a faster function that does the same on the same tensors.
        """
        self._decoder, self._capture, self._has_failed = decoder, capture, False
        self._free: dict[tuple[int, int], TokenStep] = {}  # at most one, by its shape
        self._used: weakref.WeakKeyDictionary[KeyValueCache, list[TokenStep]] = weakref.WeakKeyDictionary()

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor | None:
        """Return the logits of the token after one token, and add that to the cache.

        Args:
            tokens: [batch, 1] int64.
            cache: The tokens before, at least one.
        Returns:
            [batch, vocab], overwritten by the next call with this cache. None if a step cannot be captured: then the
            cache is as it was.
        """
        held = self._used.get(cache)  # the step, if there is one
        if held is None:
            held = self._used[cache] = []
            weakref.finalize(cache, self._keep, held).atexit = False
        if not (held and held[0].holds(cache)):
            held.clear()  # a smaller step: the cache alone still has its buffers, until they are copied
            step = self._take(cache)
            if step is None:
                return None
            held.append(step)
        logits = held[0](tokens, position=cache.length)
        cache.advance(1)
        return logits

    def _keep(self, held: list[TokenStep]) -> None:
        """Keep the step of a text that has ended, in place of any other."""
        if held and not self._has_failed:
            self._free = {held[0].shape: held[0]}

    def _take(self, cache: KeyValueCache) -> TokenStep | None:
        """Return a step with the tokens of a cache."""
        if self._has_failed:
            return None
        size = max(SMALLEST, power_of_two(cache.length + 1))
        step = self._free.pop((len(next(iter(cache.pairs.values()))[0]), size), None)
        self._free.clear()  # before more memory is taken
        if step is None:
            try:
                with compiling():
                    step = TokenStep(self._decoder, like=cache, size=size, capture=self._capture)
            except (RuntimeError, TypeError) as error:  # TypeError: a position method that takes a number as its start
                logger.warning("each token is decoded without a CUDA graph: %s", error)
                self._has_failed = True
                self._free.clear()  # another text may have ended meanwhile
                return None
        step.cache.adopt(cache)
        return step
