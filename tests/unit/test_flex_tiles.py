"""The tiles that FlexAttention computes: torch's own for a mask, and none that has weight is missing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from configs.positions import slopes
from parallel.documents import Documents
from training.model.kernels import flex
from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.kernels.tiles import (
    TILE,
    TileFinder,
    block_mask,
    mask_of_all,
    nearest_sums,
    tiles_of_documents,
    tiles_with_weight,
)
from training.model.positions.alibi import slope_formula
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows, share_limit

HEADS, FIRST, LOCAL = 12, 3, 5  # heads of the model, not a power of two, and those of one tensor rank
LISTS = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
CPU = torch.device("cpu")
LOCAL_SLOPES = torch.tensor(slopes(HEADS)[FIRST : FIRST + LOCAL], dtype=torch.float64)


def random_qk(tiles: int, *, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return queries and keys [batch, heads, tiles, TILE, head_dim]; two heads have an outlier."""
    generator = torch.Generator().manual_seed(seed)
    q, k = scale * torch.randn(2, 2, LOCAL, tiles, TILE, 16, generator=generator)
    k[:, 1, 0, 3] *= 30  # a far key that all must see
    q[:, 2, 1] = 0
    return q, k


def mask_of(q: Tensor, k: Tensor, window: int | None = None, starts: Tensor | None = None) -> BlockMask:
    counts = tiles_with_weight(q, k, LOCAL_SLOPES.float(), window, starts)
    made: BlockMask = block_mask(counts, window=window, starts=starts)
    return made


def starts_of(tiles: int, *firsts: tuple[int, ...]) -> Tensor:
    """Return the place of the first token of each token's document, [batch, tiles * TILE]."""
    starts = torch.zeros(len(firsts), tiles * TILE, dtype=torch.long)
    for row, places in zip(starts, firsts, strict=True):
        row[list(places)] = torch.tensor(places)
    return starts.cummax(1).values


def documents_of(tiles: int) -> Tensor:
    """Return documents that begin within tiles, with them and one token behind, and a row with one document."""
    return starts_of(tiles, (0, 1, 100, 127, 256, 513, 520), (0,))


def seen_scores(mask: BlockMask) -> Tensor:
    """Return which scores a kernel computes, [batch, heads, queries, keys]."""
    tiles = mask.to_dense().bool()
    position = torch.arange(tiles.shape[2] * TILE)
    batch, head = (torch.arange(count) for count in tiles.shape[:2])
    seen = mask.mask_mod(batch[:, None, None, None], head[:, None, None], position[:, None], position[None, :])
    return tiles.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3) & seen


@pytest.mark.parametrize("window", [None, 1, 2, 100, 128, 129, 130, 255, 256, 257, 384, 600, 5000])
def test_the_tiles_of_a_window_are_those_of_torch(window: int | None) -> None:
    ours, density = mask_of_all(1, LOCAL, 5, window=window, device=CPU)
    theirs = create_block_mask(ours.mask_mod, 1, LOCAL, 5 * TILE, 5 * TILE, device="cpu")
    assert ours.shape == theirs.shape
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert density.item() == pytest.approx(theirs.to_dense().sum().item() / (LOCAL * 15))


@pytest.mark.parametrize("window", [None, 1, 129, 300, 5000])
def test_the_tiles_of_documents_are_those_of_torch(window: int | None) -> None:
    starts = documents_of(5)
    counts = tiles_of_documents(starts, heads=LOCAL, window=window)
    ours: BlockMask = block_mask(counts, window=window, starts=starts)
    theirs = create_block_mask(ours.mask_mod, 2, LOCAL, 5 * TILE, 5 * TILE, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert not counts.whole.any(), "the mask is computed in each of them"
    assert counts.density.item() == pytest.approx(theirs.to_dense().sum().item() / (2 * LOCAL * 15))
    place = torch.arange(5 * TILE)
    seen = (place <= place[:, None]) & (place >= starts[:, :, None])
    seen = seen if window is None else seen & (place > place[:, None] - window)
    assert torch.equal(seen_scores(ours)[:, 0], seen)


@pytest.mark.parametrize("starts", [None, documents_of(8)])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_columns_are_the_rows_transposed(window: int | None, scale: float, starts: Tensor | None) -> None:
    q, k = random_qk(8, seed=0, scale=scale)
    ours = mask_of(q, k, window, starts)
    assert ours.full_kv_num_blocks is not None
    theirs = BlockMask.from_kv_blocks(
        ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices, BLOCK_SIZE=TILE
    )
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for numbers, name in (("q_indices", "q_num_blocks"), ("full_q_indices", "full_q_num_blocks")):
        beyond = torch.arange(8) >= getattr(ours, name)[..., None]
        listed = [getattr(mask, numbers).masked_fill(beyond, 99).sort(-1).values for mask in (ours, theirs)]
        assert torch.equal(*listed), numbers


@settings(max_examples=8, deadline=None)
@given(
    scale=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    window=st.sampled_from([None, 5, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_left_out_has_no_weight(
    scale: float, window: int | None, dtype: torch.dtype, documents: bool, seed: int
) -> None:
    q, k = (x.to(dtype) for x in random_qk(5, seed=seed, scale=scale))
    starts = documents_of(5) if documents else None
    mask = mask_of(q, k, window, starts)
    wide_q, wide_k = q.flatten(2, 3).double(), k.flatten(2, 3).double()
    bias = SlopeBias(LOCAL_SLOPES)
    bias.window = window
    length = wide_q.shape[2]
    strip = bias(rows=length, keys=length, device=CPU, dtype=torch.float64)
    scores = wide_q @ wide_k.mT / wide_q.shape[3] ** 0.5 + strip
    if starts is not None:
        scores = scores.masked_fill(torch.arange(length) < starts[:, None, :, None], -torch.inf)
    weights = scores.softmax(-1)
    assert weights.masked_fill(seen_scores(mask), 0).sum(-1).max() <= share_limit(dtype)


def test_density_is_that_of_the_mask() -> None:
    q, k = random_qk(8, seed=1)
    counts = tiles_with_weight(q, k, LOCAL_SLOPES.float(), None)
    computed = mask_of(q, k).to_dense().sum((2, 3)) / 36
    assert counts.density.item() == pytest.approx(computed.mean().item())
    steep, outlier = computed[0, 0].item(), computed[0, 1].item()
    assert steep < outlier
    assert steep < 0.9


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_all_keys_are_taken_where_a_number_is_not_finite(bad: float) -> None:
    for which, tile in ((0, 5), (1, 2)):
        inputs = random_qk(8, seed=2, scale=0.3)
        inputs[which][0, 0, tile, 7, 1] = bad
        rows = mask_of(*inputs).to_dense().sum(3)
        begins = tile if which == 0 else tile + 1  # the tiles that see it from afar
        assert torch.equal(rows[0, 0, begins], torch.tensor(begins + 1, dtype=rows.dtype))
        assert rows[1, 0, 7] < 8


def test_the_nearest_keys_bound_the_sum_of_weights() -> None:
    q, k = (x.flatten(2, 3).double() for x in random_qk(2, seed=3))
    strip = SlopeBias(LOCAL_SLOPES)(rows=q.shape[2], keys=q.shape[2], device=CPU, dtype=torch.float64)
    scores = q @ k.mT / q.shape[3] ** 0.5 + strip
    near = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(-7)
    expected = scores.masked_fill(~near, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(nearest_sums(q, k, LOCAL_SLOPES, nearest=8), expected)


def test_the_nearest_keys_are_of_the_same_document() -> None:
    q, k = (x.flatten(2, 3).double() for x in random_qk(2, seed=3))
    starts = starts_of(2, (0, 1, 100, 103), (0, 128))
    place = torch.arange(q.shape[2])
    near = (place <= place[:, None]) & (place > place[:, None] - 8) & (place >= starts[:, :, None])
    distance = place[:, None] - place
    scores = q @ k.mT / q.shape[3] ** 0.5 - LOCAL_SLOPES[:, None, None] * distance
    expected = scores.masked_fill(~near[:, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(nearest_sums(q, k, LOCAL_SLOPES, nearest=8, starts=starts), expected)


@pytest.mark.parametrize("starts", [None, documents_of(6)[:1]])
@pytest.mark.parametrize("window", [None, 300])
def test_computed_tiles_have_the_references_gradients(window: int | None, starts: Tensor | None) -> None:
    # FlexAttention has no backward pass on a CPU: write out what its kernels compute, by rows and by columns.
    q, k = (x.flatten(2, 3)[:1].double().requires_grad_() for x in random_qk(6, seed=4))
    v = torch.randn(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    bias = SlopeBias(LOCAL_SLOPES)
    bias.window = window
    by_tile = [x.detach().float().view(1, LOCAL, 6, TILE, 16) for x in (q, k)]
    seen = seen_scores(mask_of(by_tile[0], by_tile[1], window, starts))
    documents = None if starts is None else Documents(starts == torch.arange(6 * TILE), device=CPU)
    strip = bias(rows=q.shape[2], keys=q.shape[2], device=CPU, dtype=torch.float64)
    scores = (q @ k.mT / q.shape[3] ** 0.5 + strip).masked_fill(~seen, -torch.inf)
    out, exact = scores.softmax(-1) @ v, Reference(bias)(q, k, v, documents)
    assert (out - exact).abs().max() <= 2 * share_limit(torch.float32) * v.abs().max()
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(6))
    for found, expected in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(exact, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("position", "queries", "keys", "window"), [("none", 200, 200, 50), ("alibi", 5, 300, 130)])
@torch.no_grad()
def test_flex_with_a_window_equals_the_reference(position: str, queries: int, keys: int, window: int) -> None:
    bias = SlopeBias(LOCAL_SLOPES, slope_of=slope_formula(HEADS, first=FIRST))
    if position == "none":
        bias = SlopeBias(None)
    bias.window = window
    q, k, v = torch.randn(3, 2, LOCAL, keys, 16, generator=torch.Generator().manual_seed(7))
    found = Flex(bias)(q[:, :, keys - queries :], k, v)
    torch.testing.assert_close(found, Reference(bias)(q[:, :, keys - queries :], k, v), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("lossless", [False, True])
def test_queries_after_a_cache_take_their_rows_of_tiles(lossless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "FEWEST_TILES_OF_WINDOWS", 2)
    made: list[BlockMask] = []
    monkeypatch.setattr(flex, "flex_kernel", lambda *_: lambda *qkv, **how: made.append(how["block_mask"]) or qkv[0])
    exact, bias = (SlopeBias(LOCAL_SLOPES, slope_of=slope_formula(HEADS, first=FIRST)) for _ in range(2))
    bias.lossless = LosslessWindows() if lossless else None
    q, k, v = torch.randn(3, 1, LOCAL, 600, 16, generator=torch.Generator().manual_seed(8))
    for trains in (False, True):
        Flex(bias)(q[:, :, 400:].clone().requires_grad_(trains), k, v)
    after, whole = ((mask.kv_num_blocks + mask.full_kv_num_blocks)[0] for mask in made)
    assert torch.equal(after[:, :3], torch.ones(LOCAL, 3, dtype=torch.int32)), "rows without queries"
    assert torch.equal(after[:, 3:], whole[:, 3:])
    assert whole[-1].tolist() == [1, 2, 3, 4, 5], "a backward pass takes rows as columns need them"
    if bias.lossless is not None:
        density, _ = bias.lossless.take()
        torch.testing.assert_close(density, (after[:, 3:].sum(1) / (4 + 5)).mean())
    monkeypatch.undo()
    with torch.no_grad():
        found = Flex(bias)(q[:, :, 400:], k, v)
    torch.testing.assert_close(found, Reference(exact)(q[:, :, 400:], k, v), atol=1e-5, rtol=0)


def test_a_failing_compiler_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no ptxas\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: failing)
    find, (q, k) = TileFinder(), random_qk(3, seed=9)
    expected = tiles_with_weight(q, k, LOCAL_SLOPES.float(), None)
    for _ in range(2):
        assert all(map(torch.equal, find(q, k, LOCAL_SLOPES.float(), None), expected))
    (line,) = caplog.messages
    assert line == "lossless windows are found by slower functions: torch's compiler fails (no ptxas)"
