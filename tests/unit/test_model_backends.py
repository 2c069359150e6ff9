"""The backends made for GPUs, as far as a CPU can test them: their formula and their calls."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.errors import MachineError
from configs.positions import slopes
from parallel.documents import Documents
from training.model.kernels import flash4, flex
from training.model.kernels.flash import Flash
from training.model.kernels.flash4 import Flash4
from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.kernels.tiles import TILE, visible
from training.model.positions.alibi import slope_formula
from training.model.positions.bias import SlopeBias

HEADS = 3


def bias_of(position: str) -> SlopeBias:
    if position == "none":
        return SlopeBias(None)
    local = torch.tensor(slopes(HEADS), dtype=torch.float64)
    return SlopeBias(local, slope_of=slope_formula(HEADS, first=0) if position == "alibi" else None)


def random_qkv(queries: int, keys: int, *, seed: int, head_dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, HEADS, queries, head_dim, generator=generator)
    k, v = torch.randn(2, 2, HEADS, keys, head_dim, generator=generator)
    return q, k, v


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("position", ["alibi", "looked up", "none"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (200, 200), (5, 40), (1, 150), (130, 300)])
@torch.no_grad()
def test_flex_on_the_cpu_equals_the_reference(position: str, queries: int, keys: int) -> None:
    bias, inputs = bias_of(position), random_qkv(queries, keys, seed=0)
    torch.testing.assert_close(Flex(bias)(*inputs), Reference(bias)(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["alibi", "none"])
@pytest.mark.parametrize("length", [1, 130, 300])
def test_the_formulas_of_flex_have_the_references_gradients(position: str, length: int) -> None:
    # FlexAttention has no backward pass on a CPU: write out its score function and mask, padded as it pads.
    bias = bias_of(position)
    tiles = max(flex.FEWEST_TILES, -(-length // TILE))
    score_of = flex.penalty(bias.slope_of(torch.device("cpu")))
    q, k, v = (x.double().requires_grad_() for x in random_qkv(length, length, seed=2))
    end = tiles * TILE - length
    wide = [F.pad(x, (0, 0, 0, end)) for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT / q.shape[3] ** 0.5
    batch, head, query, key = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_of is not None:
        scores = score_of(scores, batch, head, query, key)
    scores = scores.masked_fill(~visible(None)(batch, head, query, key), -torch.inf)
    out = (scores.softmax(-1) @ wide[2])[:, :, :length]
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(out, (q, k, v), weight)
    exact = torch.autograd.grad(Reference(bias)(q, k, v), (q, k, v), weight)
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # its slopes are fp32


def test_the_slope_formula_is_alibis_for_any_heads_and_split() -> None:
    for heads in range(1, 129):
        expected = torch.tensor(slopes(heads), dtype=torch.float64).float()
        for ranks in (ranks for ranks in range(1, heads + 1) if heads % ranks == 0):
            local = heads // ranks
            parts = [slope_formula(heads, first=rank * local)(torch.arange(local)) for rank in range(ranks)]
            torch.testing.assert_close(torch.cat(parts), expected, atol=0, rtol=2**-22)


def test_flash4_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="model.attention flash4 needs the package flash-attn-4"):
        Flash4(bias_of("alibi"))
    monkeypatch.setattr(flash4, "installed_packages", lambda: frozenset({"flash-attn-4"}))
    attend = Flash4(bias_of("alibi"))
    assert (attend.options, Flex.options) == ({"BACKEND": "FLASH"}, {"IS_DIVISIBLE": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(MachineError, match="flash4 needs a GPU of compute capability 9.0, this one has 8.9"):
        Flash4(bias_of("alibi"))


def each_sequence(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **how: Any,
) -> Tensor:
    """Stand in for flash_attn_varlen_func: [total tokens, heads, head_dim]; cu_seqlens are [sequences + 1] int32."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype is torch.int32
    ends = cu_seqlens_q.tolist()
    assert (ends[0], ends[-1]) == (0, len(q))
    assert max_seqlen_q == max_seqlen_k == max(end - first for first, end in pairwise(ends))
    return torch.cat([attend(*(x[None, a:b] for x in (q, k, v)), **how)[0] for a, b in pairwise(ends)])


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for flash-attn, and what it was called with.

    It follows flash_attn_func's documentation: layout [batch, seq, heads, head_dim]; scale 1 / sqrt(head_dim); causal
    and ALiBi aligned to the bottom right, the bias being -slope * |i + keys - queries - j|; slopes fp32. It checks
    our call against that documentation. It does not replace a run on hardware.
    """
    calls: list[dict[str, Any]] = []

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        assert not deterministic
        calls.append({"q": q, "k": k, "v": v, "causal": causal, "alibi_slopes": alibi_slopes})
        (_, queries, heads, head_dim), keys = q.shape, k.shape[1]
        assert heads == k.shape[2] == v.shape[2], "flash-attn's layout is [batch, seq, heads, head_dim]"
        aligned = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None, :]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5
        if alibi_slopes is not None:
            assert alibi_slopes.dtype is torch.float32, "flash-attn takes fp32 slopes"
            assert tuple(alibi_slopes.shape) in ((heads,), (q.shape[0], heads))
            scores = scores - alibi_slopes[..., None, None] * aligned.abs()
        if causal:
            scores = scores.masked_fill(aligned < 0, -torch.inf)
        before, after = window_size
        if before >= 0:  # a query sees keys from `before` ahead of it to `after` behind it
            scores = scores.masked_fill((aligned > before) | (aligned < -after), -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = partial(each_sequence, flash_attn_func)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("position", ["alibi", "none"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (5, 40), (1, 30)])
@torch.no_grad()
def test_the_call_of_flash_means_the_reference(
    flash_calls: list[dict[str, Any]], position: str, queries: int, keys: int, window: int | None
) -> None:
    bias, inputs = bias_of(position), random_qkv(queries, keys, seed=1)
    bias.window = window
    out = Flash(bias)(*inputs)
    assert out.shape == inputs[0].shape
    torch.testing.assert_close(out, Reference(bias)(*inputs), atol=1e-5, rtol=0)
    (call,) = flash_calls
    assert call["causal"] is True
    assert (call["alibi_slopes"] is None) == (position == "none")


@pytest.mark.usefixtures("flash_calls")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("position", ["alibi", "none"])
@torch.no_grad()
def test_flash_takes_documents_as_sequences(position: str, window: int | None) -> None:
    bias, inputs = bias_of(position), random_qkv(40, 40, seed=1)
    bias.window = window
    begins = torch.zeros(2, 40)
    begins[0, [1, 17, 39]] = begins[1, 20] = 1
    documents = Documents(begins, device=torch.device("cpu"))
    out = Flash(bias)(*inputs, documents)
    assert out.shape == inputs[0].shape
    torch.testing.assert_close(out, Reference(bias)(*inputs, documents), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("flash_calls")
def test_flash_is_refused_on_a_gpu_that_is_too_old_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(
        MachineError, match="model.attention flash needs a GPU of compute capability 8.0, this one has 7.5"
    ):
        Flash(bias_of("alibi"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@settings(max_examples=10, deadline=None)
@given(queries=st.integers(1, 30), before=st.integers(0, 30), seed=st.integers(0, 99))
@torch.no_grad()
def test_flex_follows_the_length_at_each_call(queries: int, before: int, seed: int) -> None:
    bias, inputs = bias_of("alibi"), random_qkv(queries, before + queries, seed=seed)
    torch.testing.assert_close(Flex(bias)(*inputs), Reference(bias)(*inputs), atol=1e-5, rtol=0)
