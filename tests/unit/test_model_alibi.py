"""ALiBi and attention against transformers and against formulas written out here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from parallel.axes import Group
from training.model.kernels import sdpa
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import local_slopes, slopes
from training.model.positions.bias import SlopeBias, causal_bias


def test_slopes_equal_transformers_for_every_head_count() -> None:
    for heads in range(1, 129):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(torch.tensor(slopes(heads)), theirs, rtol=1e-6, atol=0, msg=f"{heads} heads")


def test_eight_heads_have_the_slopes_of_the_paper() -> None:
    assert slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@given(st.integers(1, 8), st.integers(1, 16))
def test_slices_of_any_tensor_size_join_to_the_whole(size: int, local: int) -> None:
    parts = [local_slopes(size * local, tensor=Group(rank, size, None)) for rank in range(size)]
    assert torch.equal(torch.cat(parts), torch.tensor(slopes(size * local), dtype=torch.float64))


def test_bias_is_minus_slope_times_distance_and_nothing_ahead() -> None:
    bias = causal_bias(torch.tensor([0.5, 0.25]), queries=2, keys=3)
    inf = float("inf")
    assert bias.tolist() == [[[-0.5, 0.0, -inf], [-1.0, -0.5, 0.0]], [[-0.25, 0.0, -inf], [-0.5, -0.25, 0.0]]]


def test_bias_is_exact_at_distances_past_65536() -> None:
    # bf16 holds no odd number past 256: rounded positions or distances lose the sharp heads.
    keys, sharpest = 70_001, torch.tensor([2**-0.5, 2**-8])
    bias = causal_bias(sharpest, queries=1, keys=keys)[:, 0]
    expected = -sharpest.double()[:, None] * torch.arange(keys - 1, -1, -1)
    torch.testing.assert_close(bias.double(), expected, atol=0, rtol=1e-7)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: list[float]) -> torch.Tensor:
    """Attention row by row, from the paper's formula."""
    out = torch.zeros_like(q)
    before = k.shape[2] - q.shape[2]
    for head, slope in enumerate(heads):
        for row in range(q.shape[2]):
            seen = before + row + 1
            scores = q[:, head, row : row + 1] @ k[:, head, :seen].mT / q.shape[-1] ** 0.5
            scores = scores - slope * torch.arange(seen - 1, -1, -1, dtype=q.dtype)
            out[:, head, row : row + 1] = scores.softmax(-1) @ v[:, head, :seen]
    return out


@settings(max_examples=20, deadline=None)
@given(queries=st.integers(1, 24), before=st.integers(0, 20), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_both_backends_equal_the_formula_in_fp64(queries: int, before: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, queries, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 3, before + queries, 8, dtype=torch.float64, generator=generator)
    # Multiples of a power of two: exact in fp32, so that the formula sees the very same slopes.
    chosen = [0.5, 0.0625, 0.00390625]
    expected = explicit(q, k, v, chosen)
    strip = SlopeBias(torch.tensor(chosen))
    torch.testing.assert_close(Reference(strip)(q, k, v), expected, atol=1e-12, rtol=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        torch.testing.assert_close(Sdpa(SlopeBias(torch.tensor(chosen)))(q, k, v), expected, atol=1e-12, rtol=0)


def test_backends_agree_past_a_block_in_fp32_with_gradients() -> None:
    torch.manual_seed(0)
    strip = SlopeBias(torch.tensor(slopes(4)))
    q, k, v = (torch.randn(1, 4, 600, 16, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 4, 600, 16)
    for backend in (Reference, Sdpa):
        (backend(strip)(q, k, v) * weight).sum().backward()
    torch.testing.assert_close(Sdpa(strip)(q, k, v), Reference(strip)(q, k, v), atol=1e-5, rtol=0)
    grads = [x.grad.clone() for x in (q, k, v) if x.grad is not None]
    for x in (q, k, v):
        x.grad = None
    (Reference(strip)(q, k, v) * weight).sum().backward()
    for both, x in zip(grads, (q, k, v), strict=True):
        assert x.grad is not None
        torch.testing.assert_close(both, 2 * x.grad, atol=1e-4, rtol=1e-4)


def test_bias_strip_grows_and_shrinks_with_the_length() -> None:
    strip = SlopeBias(torch.tensor([0.5]))
    for queries, keys in ((2, 3), (256, 700), (1, 1), (5, 640), (300, 300), (3, 900)):
        torch.testing.assert_close(
            strip(rows=queries, keys=keys, device=torch.device("cpu"), dtype=torch.float32)[0],
            causal_bias(torch.tensor([0.5]), queries=queries, keys=keys),
        )


def test_a_generated_token_reuses_the_row_that_is_kept() -> None:
    strip = SlopeBias(torch.tensor([0.5]))
    rows = [strip(rows=1, keys=keys, device=torch.device("cpu"), dtype=torch.float32) for keys in range(1, 65)]
    assert len({row.untyped_storage().data_ptr() for row in rows[32:]}) == 1
    for keys, row in enumerate(rows, start=1):
        assert row[0, 0, 0].tolist() == [-0.5 * distance for distance in range(keys - 1, -1, -1)]


class Watched(SlopeBias):
    """Records the requested types."""

    def __init__(self) -> None:
        super().__init__(torch.tensor([0.5], dtype=torch.float64))
        self.asked: list[torch.dtype] = []

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self.asked.append(dtype)
        return super().__call__(rows=rows, keys=keys, device=device, dtype=dtype)


@pytest.mark.parametrize("backend", [Reference, Sdpa])
def test_the_bias_is_fp32_or_as_wide_as_the_queries(backend: type[Reference] | type[Sdpa]) -> None:
    for type_, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        bias = Watched()
        x = torch.zeros(1, 1, 4, 8, dtype=type_)
        assert backend(bias)(x, x, x).dtype is type_
        assert bias.asked == [expected]
