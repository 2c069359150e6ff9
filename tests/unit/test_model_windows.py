"""Lossless windows: no row loses more than the limit, whatever the queries and keys are, and windows do leave keys out.

Rows are computed in fp64 with the limit of fp32 or bf16, so that what differs from the exact rows is what was left out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from configs.precisions import PRECISIONS
from configs.schema import Model
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from tests.support.models import VOCABULARY, counterpart_of, make_decoder, small_model, weights_of
from training.model import windows
from training.model.attention import windows_of
from training.model.kernels import sdpa, sdpa_cpu
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import slopes
from training.model.positions.bias import SlopeBias, causal_bias
from training.model.proof.attention_weights import dtype_of, read_rows, total_variation
from training.model.single import lone_decoder
from training.model.windows import LosslessWindows, first_keys_with_weight, norms, reach, share_limit

LIMITS = {dtype: share_limit(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
ROW_LIMITS = {dtype_of(name): PRECISIONS[name].row_tolerance for name in ("fp32", "bf16", "fp16")}
TRAINED = Path(__file__).parents[1] / "fixtures" / "trained_attention.safetensors"
ROUNDING = 1e-12  # of fp64 rows
Qk = tuple[Tensor, Tensor]


def _loud_key(q: Tensor, k: Tensor) -> Qk:
    """Far away, a key with a huge norm."""
    k[:, :, k.shape[2] // 8] *= 60
    return q, k


def _sink(q: Tensor, k: Tensor) -> Qk:
    """The first token has a large score with every query."""
    q[..., 0] += 6
    k[:, :, 0] = 0
    k[:, :, 0, 0] = 12
    return q, k


def _opposed(q: Tensor, k: Tensor) -> Qk:
    """Near keys have scores far below zero, the early ones far above."""
    q[..., 0] += 8
    k[:, :, :, 0] -= 8
    k[:, :, : k.shape[2] // 3, 0] += 16
    return q, k


KINDS: dict[str, Callable[[Tensor, Tensor], Qk]] = {
    "random": lambda q, k: (q, k),
    "loud key": _loud_key,
    "equal scores": lambda q, k: (q, k[:, :, :1].expand_as(k).contiguous()),
    "zero queries": lambda q, k: (0 * q, k),
    "zero keys": lambda q, k: (q, 0 * k),
    "sink": _sink,
    "opposed": _opposed,
}
some_kind = st.sampled_from(sorted(KINDS))
some_limit = st.sampled_from(sorted(LIMITS.values()))
some_heads = st.sampled_from([1, 2, 3, 8, 12])
some_scale = st.sampled_from([0.1, 1.0, 3.0])
some_seed = st.integers(0, 99)


def draw(kind: str, *, batch: int, heads: int, queries: int, keys: int, head_dim: int, scale: float, seed: int) -> Qk:
    generator = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(batch, heads, queries, head_dim, dtype=torch.float64, generator=generator)
    k = scale * torch.randn(batch, heads, keys, head_dim, dtype=torch.float64, generator=generator)
    return KINDS[kind](q, k)


def slopes_of(heads: int) -> Tensor:
    return torch.tensor(slopes(heads), dtype=torch.float64)


def windowed(heads: int) -> SlopeBias:
    bias = SlopeBias(slopes_of(heads))
    bias.lossless = LosslessWindows()
    return bias


def exact_scores(q: Tensor, k: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the scores with ALiBi, [batch, heads, queries, keys]."""
    penalty = causal_bias(slopes_of(q.shape[1]).to(dtype), queries=q.shape[2], keys=k.shape[2])
    scores: Tensor = (q.to(dtype) @ k.to(dtype).mT) / q.shape[3] ** 0.5 + penalty
    return scores


@contextmanager
def small_blocks(*, limit: float, block: int = 16, near: int = 40, step: int = 8) -> Iterator[None]:
    """Let short sequences have far keys, and every type the same limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        patch.setattr(sdpa, "NEAR_KEYS", near)
        patch.setattr(sdpa_cpu, "FAR_KEYS", step)
        patch.setattr(sdpa_cpu, "is_searched", lambda q, *, trains: q.shape[2] > 1)
        patch.setattr(windows, "share_limit", lambda dtype: limit)
        yield


@settings(max_examples=60, deadline=None)
@given(
    kind=some_kind,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    heads=some_heads,
    keys=st.integers(1, 300),
    near=st.integers(1, 40),
    head_dim=st.sampled_from([1, 8, 64]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 3.0, 60.0]),
    seed=some_seed,
)
@example(kind="opposed", dtype=torch.float32, heads=8, keys=300, near=40, head_dim=8, scale=0.1, seed=0)
@torch.no_grad()
def test_keys_out_of_reach_weigh_less_than_the_limit(
    kind: str, dtype: torch.dtype, heads: int, keys: int, near: int, head_dim: int, scale: float, seed: int
) -> None:
    q, k = draw(kind, batch=2, heads=heads, queries=keys, keys=keys, head_dim=head_dim, scale=scale, seed=seed)
    q, k = q.to(dtype), k.to(dtype)
    scores, wide = exact_scores(q, k), norms(q).dtype
    distance = torch.arange(keys)[:, None] - torch.arange(keys)
    rounded = exact_scores(q.to(wide), k.to(wide), dtype=wide)  # as a kernel knows them
    sums = rounded.masked_fill(distance >= near, -math.inf).logsumexp(-1)
    reached = reach(q, radius=norms(k).cummax(2).values, sums=sums, slopes=slopes_of(heads))
    out = (distance >= reached[..., None]) & (distance >= 0)
    assert (scores.softmax(-1) * out).sum(-1).max() <= share_limit(dtype)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 130), limit=some_limit)
@torch.no_grad()
def test_the_bound_is_tight_where_scores_are_equal(heads: int, limit: float) -> None:
    q = torch.zeros(1, heads, 1, 4, dtype=torch.float64)
    slope = slopes_of(heads)
    sums = -(-torch.expm1(-slope)).log()[None, :, None]  # of a row without a beginning
    with small_blocks(limit=limit):
        reached = reach(q, radius=torch.ones(1, heads, 1), sums=sums, slopes=slope)[0, :, 0]
    share = (-slope * reached).exp()  # what lies beyond, of a geometric series
    assert (share <= limit).all()
    assert (share >= 0.95 * limit).all()


@settings(max_examples=40, deadline=None)
@given(
    kind=some_kind,
    limit=some_limit,
    heads=some_heads,
    queries=st.integers(2, 200),
    before=st.integers(0, 120),
    block=st.integers(1, 20),
    near=st.integers(1, 60),
    step=st.sampled_from([1, 8, 32]),
    scale=some_scale,
    seed=some_seed,
)
@example(
    kind="loud key",
    limit=LIMITS[torch.bfloat16],
    heads=8,
    queries=200,
    before=0,
    block=16,
    near=20,
    step=8,
    scale=1.0,
    seed=0,
)
@torch.no_grad()
def test_no_row_of_sdpa_loses_more_than_the_limit(
    kind: str,
    limit: float,
    heads: int,
    queries: int,
    before: int,
    block: int,
    near: int,
    step: int,
    scale: float,
    seed: int,
) -> None:
    keys = queries + before
    q, k = draw(kind, batch=1, heads=heads, queries=queries, keys=keys, head_dim=32, scale=scale, seed=seed)
    with small_blocks(limit=limit, block=block, near=near, step=step):
        rows = read_rows(Sdpa(windowed(heads)), q, k)
    assert total_variation(rows, exact_scores(q, k)[0].softmax(-1)).max() <= limit + ROUNDING


def test_scores_are_looked_at_where_a_backward_pass_is_saved() -> None:
    shape = {"batch": 1, "heads": 8, "queries": 2048, "keys": 2048, "scale": 1.0, "seed": 0}
    searched = []
    for head_dim, trains in ((64, True), (64, False), (16, True)):
        q, k = (x.float().requires_grad_(trains) for x in draw("random", head_dim=head_dim, **shape))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sdpa_cpu, "first_keys_with_weight", lambda *_, firsts, **__: searched.append(1) or firsts)
            Sdpa(windowed(8))(q, k, k)
        searched.append(0)
    assert searched == [*[1] * 6, 0, 0, 0], "blocks of 256 queries with far keys, all but two of eight"


@pytest.mark.parametrize("limit", LIMITS.values(), ids=str)
@torch.no_grad()
def test_keys_of_equal_weight_fill_half_of_the_limit(limit: float) -> None:
    slope, keys, step = 0.02, 400, 8
    tile = 0.1 * limit  # what each of the tiles weighs
    q = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    k = math.log(tile / step) + slope * (keys - torch.arange(keys, dtype=torch.float64)).expand(2, 1, keys)[..., None]
    k[0] -= 5  # the second sequence decides
    with small_blocks(limit=limit):
        (first,) = first_keys_with_weight(
            q,
            k,
            firsts=[16],
            end=keys,
            position=keys,
            step=step,
            sums=torch.zeros(2, 1, 1, dtype=torch.float64),
            radius=k.norm(dim=3).amax(2, keepdim=True),
            slopes=torch.tensor([slope], dtype=torch.float64),
        )
    assert 16 + 3 * step <= first <= 16 + 5 * step
    assert first % step == 0


@settings(max_examples=8, deadline=None)
@given(limit=some_limit, scale=some_scale, seed=some_seed, step=st.sampled_from([8, 32]))
@torch.no_grad()
def test_long_keys_that_no_query_meets_are_left_out(limit: float, scale: float, seed: int, step: int) -> None:
    q, k = draw("random", batch=1, heads=4, queries=400, keys=400, head_dim=16, scale=scale, seed=seed)
    q[..., 0] = 0  # where the early keys are long
    densities = []
    for length in (0.0, 100.0):
        k[:, :, :200, 0] = length
        with small_blocks(limit=limit, step=step):
            bias = windowed(4)
            Sdpa(bias)(q, k, k)
            densities += bias.lossless.take() if bias.lossless else []
    assert densities[1] <= densities[0] + 0.05
    assert densities[1] < 0.95


@pytest.mark.parametrize("heads", [16, 112])
@pytest.mark.parametrize("dtype", LIMITS)
@torch.no_grad()
def test_rows_stay_within_the_audits_limits(dtype: torch.dtype, heads: int) -> None:
    q, k = draw("random", batch=1, heads=heads, queries=8, keys=900, head_dim=64, scale=1.0, seed=1)
    q, k = q.to(dtype), k.to(dtype)
    bias = windowed(heads)
    rows = read_rows(Sdpa(bias), q, k)
    assert total_variation(rows, exact_scores(q, k)[0].softmax(-1)).max() <= ROW_LIMITS[dtype]
    densities = [float(density) for density in bias.lossless.take()] if bias.lossless else []
    assert densities
    assert max(densities) < 0.9, "no key was left out"


@settings(max_examples=15, deadline=None, report_multiple_bugs=False)
@given(kind=some_kind, limit=some_limit, heads=some_heads, queries=st.integers(60, 160), seed=some_seed)
@example(kind="random", limit=LIMITS[torch.bfloat16], heads=2, queries=160, seed=0)
def test_outputs_and_gradients_of_a_batch_are_the_exact_ones(
    kind: str, limit: float, heads: int, queries: int, seed: int
) -> None:
    q, k = draw(kind, batch=2, heads=heads, queries=queries, keys=queries, head_dim=8, scale=1.0, seed=seed)
    q[1], k[1] = 3 * q[1], 3 * k[1]  # it looks further than the first
    v, weighting = torch.randn(2, *q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(seed))
    exact_bias = SlopeBias(slopes_of(heads))
    found = []
    for attend in (Reference(exact_bias), Sdpa(windowed(heads))):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with small_blocks(limit=limit):
            out = attend(*inputs)
            found.append([out.detach(), *torch.autograd.grad((out * weighting).sum(), inputs)])
    for exact, measured in zip(*found, strict=True):
        assert (measured - exact).abs().max() <= 4 * queries * limit * exact.abs().max() + ROUNDING
    assert (found[1][0] - found[0][0]).abs().max() <= 2 * limit * v.abs().max() + ROUNDING


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("place", [3, 100])
@torch.no_grad()
def test_a_number_that_is_none_spreads_as_without_windows(value: float, place: int) -> None:
    q, k = draw("random", batch=1, heads=4, queries=150, keys=150, head_dim=8, scale=1.0, seed=1)
    q, k = q.float(), k.float()
    k[:, :2, place, 0] = value
    q[:, 2, place, 0] = value
    with small_blocks(limit=LIMITS[torch.float32]):
        rows = [Sdpa(bias)(q, k, k.nan_to_num()) for bias in (SlopeBias(slopes_of(4)), windowed(4))]
    torch.testing.assert_close(rows[1], rows[0], equal_nan=True)


def _losses_of_steps(windows: str, *, steps: int) -> tuple[list[float], float]:
    """Return the losses of AdamW's steps, and the mean density."""
    model = Model(layers=1, hidden=32, heads=8, init_std=0.2, windows=windows)  # type: ignore[arg-type]
    decoder = lone_decoder(model, vocab_size=VOCABULARY)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        tokens = torch.randint(0, 9, (1, 251), generator=generator)  # some tokens never occur: learned soon
        loss = decoder(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lossless = windows_of(decoder)
    return losses, float(torch.stack(lossless.take()).mean()) if lossless else 1.0


def test_fifty_steps_have_the_same_losses_without_windows() -> None:
    with small_blocks(limit=LIMITS[torch.float32], block=64, near=64, step=32):
        (with_windows, density), (without, _) = (_losses_of_steps(mode, steps=50) for mode in ("auto", "off"))
    assert density < 0.97
    assert with_windows[-1] < with_windows[0] - 1, "nothing was learned"
    assert with_windows == pytest.approx(without, rel=1e-5)


@torch.no_grad()
def test_logits_are_those_of_transformers_beyond_the_near_keys() -> None:
    decoder = make_decoder(8)
    tokens = torch.randint(0, VOCABULARY, (1, 1100), generator=torch.Generator().manual_seed(0))
    logits = decoder(tokens)
    lossless = windows_of(decoder)
    assert lossless is not None
    assert max(float(density) for density in lossless.take()) < 0.9
    expected = counterpart_of(weights_of(decoder), small_model(8))(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("limit", LIMITS.values(), ids=str)
@torch.no_grad()
def test_trained_rows_lose_less_than_the_limit(limit: float) -> None:
    # Layer 1 of 4 x 128 with 8 heads, trained for 500 steps of 8 x 128 tokens; heads 0, 2, 4 and 6 at 640 tokens.
    trained = load_file(TRAINED)
    q, k, slope = trained["q"].double(), trained["k"].double(), trained["slopes"]
    exact = Reference(SlopeBias(slope))
    bias = SlopeBias(slope)
    bias.lossless = LosslessWindows()
    with small_blocks(limit=limit):
        rows = read_rows(Sdpa(bias), q, k)
        densities = bias.lossless.take()
    assert total_variation(rows, read_rows(exact, q, k)).max() <= limit + ROUNDING
    assert 0.2 < float(densities[0]) < 0.75
    scores = norms(q).amax(2) * norms(k).amax(2) / q.shape[3] ** 0.5
    assert scores.max() > 30, "these are not trained"
