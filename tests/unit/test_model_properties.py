"""What attention and the decoder promise for any input: causality, shift invariance, slices, blocks and caches."""

from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.positions import POSITIONS
from parallel.axes import Group
from tests.support.models import VOCABULARY, learned_bias, make_decoder
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder
from training.model.kernels import sdpa
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import local_slopes, slopes
from training.model.positions.bias import QUERY_BLOCK, Bias, SlopeBias
from training.model.positions.by_distance import LearnedBias
from training.model.positions.rotary import rotate

BACKENDS = {"reference": Reference, "sdpa": Sdpa}
WHOLE = Group(0, 1, None)
HEADS = 3
some_backend = st.sampled_from(sorted(BACKENDS))
some_position = st.sampled_from(sorted(POSITIONS))
some_seed = st.integers(0, 99)
quickly = settings(max_examples=20, deadline=None)


def bias_of(position: str, *, heads: int = HEADS, tensor: Group = WHOLE) -> Bias:
    if position == "t5":
        learned = learned_bias(heads, tensor=tensor)
        whole = torch.randn(heads, learned.weight.shape[1], generator=torch.Generator().manual_seed(heads))
        learned.weight.data = whole.chunk(tensor.size)[tensor.rank].clone()
        return learned
    return SlopeBias(local_slopes(heads, tensor=tensor) if position == "alibi" else None)


@lru_cache
def decoder_of(position: str, backend: str) -> Decoder:
    """An fp64 decoder, made once."""
    return make_decoder(2, position=position, backend=backend).double()


def random_qkv(queries: int, keys: int, *, seed: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, heads, keys, 8, dtype=torch.float64, generator=generator)
    return q, k, v


@quickly
@given(
    backend=some_backend,
    position=st.sampled_from(["alibi", "t5", "none"]),
    seq=st.integers(1, 30),
    far=st.integers(1, 200),
    seed=some_seed,
)
@torch.no_grad()
def test_earlier_tokens_move_no_score_between_later_ones(
    backend: str, position: str, seq: int, far: int, seed: int
) -> None:
    attend = BACKENDS[backend](bias_of(position))
    q, k, v = random_qkv(seq, far + seq, seed=seed)
    q[..., -1], k[..., -1] = 1.0, 0.0
    k[:, :, :far, -1] = -1e5  # no query attends there: the rest is the same attention at later positions
    alone = attend(q, k[:, :, far:], v[:, :, far:])
    torch.testing.assert_close(attend(q, k, v), alone, atol=1e-12, rtol=0)


@quickly
@given(
    position=st.sampled_from(["alibi", "t5", "none"]),
    rows=st.integers(1, 20),
    keys=st.integers(1, 60),
    shift=st.integers(0, 300),
)
@torch.no_grad()
def test_a_bias_is_the_same_at_any_shift_of_positions(position: str, rows: int, keys: int, shift: int) -> None:
    rows = min(rows, keys)
    bias = bias_of(position)
    here, shifted = (
        bias(rows=rows, keys=length, device=torch.device("cpu"), dtype=torch.float64) for length in (keys, keys + shift)
    )
    assert torch.equal(shifted[..., shift:], here)


@quickly
@given(backend=some_backend, seq=st.integers(1, 30), shift=st.integers(0, 300), seed=some_seed)
@torch.no_grad()
def test_rotary_attention_is_the_same_at_any_shift_of_positions(backend: str, seq: int, shift: int, seed: int) -> None:
    attend = BACKENDS[backend](bias_of("none"))
    q, k, v = random_qkv(seq, seq, seed=seed)
    here, shifted = (attend(rotate(q, start=start), rotate(k, start=start), v) for start in (0, shift))
    torch.testing.assert_close(shifted, here, atol=1e-11, rtol=0)


@quickly
@given(
    backend=some_backend,
    position=some_position,
    changed=st.integers(1, 39),
    by=st.integers(1, VOCABULARY - 1),
    seed=some_seed,
)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(
    backend: str, position: str, changed: int, by: int, seed: int
) -> None:
    decoder = decoder_of(position, backend)
    tokens = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + by) % VOCABULARY
    before, after = decoder(tokens), decoder(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@settings(max_examples=10, deadline=None)
@given(backend=some_backend, position=some_position, changed=st.integers(1, QUERY_BLOCK + 43), seed=some_seed)
@torch.no_grad()
def test_no_later_token_changes_a_logit_across_a_query_block(
    backend: str, position: str, changed: int, seed: int
) -> None:
    decoder = decoder_of(position, backend)
    tokens = torch.randint(0, VOCABULARY, (1, QUERY_BLOCK + 44), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[0, changed:] = (tokens[0, changed:] + 1) % VOCABULARY
    before, after = decoder(tokens), decoder(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@quickly
@given(
    backend=some_backend,
    position=st.sampled_from(["alibi", "t5"]),
    size=st.integers(1, 6),
    local=st.integers(1, 4),
    seed=some_seed,
)
@torch.no_grad()
def test_attention_of_any_tensor_ranks_slices_joins_to_the_whole(
    backend: str, position: str, size: int, local: int, seed: int
) -> None:
    heads = size * local
    q, k, v = random_qkv(9, 12, seed=seed, heads=heads)
    whole = BACKENDS[backend](bias_of(position, heads=heads))(q, k, v)
    parts = [
        BACKENDS[backend](bias_of(position, heads=heads, tensor=Group(rank, size, None)))(
            *(x[:, rank * local : (rank + 1) * local] for x in (q, k, v))
        )
        for rank in range(size)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)


@quickly
@given(
    position=st.sampled_from(["alibi", "t5", "none"]),
    queries=st.integers(1, 40),
    before=st.integers(0, 30),
    block=st.integers(1, 20),
    near=st.integers(1, 40),
    seed=some_seed,
)
@example(position="alibi", queries=40, before=20, block=8, near=10, seed=0)  # two blocks of far keys and more
def test_blocks_of_any_size_equal_the_whole_with_gradients(
    position: str, queries: int, before: int, block: int, near: int, seed: int
) -> None:
    bias = bias_of(position)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        patch.setattr(sdpa, "NEAR_KEYS", near)
        for make in (Reference, Sdpa):
            inputs = [x.requires_grad_() for x in random_qkv(queries, before + queries, seed=seed)]
            out = make(bias)(*inputs)
            weighting = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
            learned = list(bias.parameters()) if isinstance(bias, LearnedBias) else []
            found.append([out, *torch.autograd.grad((out * weighting).sum(), [*inputs, *learned])])
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, whole, atol=1e-5 if blocks.dtype is torch.float32 else 1e-11, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    backend=some_backend,
    position=some_position,
    cuts=st.sets(st.integers(1, 39), max_size=6),
    block=st.integers(2, 50),
    seed=some_seed,
)
@torch.no_grad()
def test_any_split_through_the_cache_equals_the_whole(
    backend: str, position: str, cuts: set[int], block: int, seed: int
) -> None:
    decoder = decoder_of(position, backend)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(seed))
    whole, cache = decoder.hidden(tokens), KeyValueCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        parts = [decoder.hidden(tokens[:, start:end], cache) for start, end in pairwise([0, *sorted(cuts), 40])]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, dim=0), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_token_by_token_past_a_query_block_equals_the_whole(position: str, backend: str) -> None:
    decoder = decoder_of(position, backend)
    tokens = torch.randint(0, VOCABULARY, (1, 260), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache()
    parts = [decoder.hidden(tokens[:, :250], cache)]
    parts += [decoder.hidden(tokens[:, place : place + 1], cache) for place in range(250, 260)]
    torch.testing.assert_close(torch.cat(parts, dim=0), decoder.hidden(tokens), atol=1e-11, rtol=0)


@quickly
@given(heads=st.integers(1, 200))
def test_slopes_are_distinct_and_below_one(heads: int) -> None:
    found = slopes(heads)
    assert len(set(found)) == heads
    assert all(0 < slope < 1 for slope in found)
