"""The precision audit: the limits, what the usual form loses, and that the audit sees a broken bias."""

import pytest
import torch

from configs.precisions import PRECISIONS
from parallel.axes import Group
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions import bias
from training.model.positions.alibi import local_slopes, slopes
from training.model.positions.bias import SlopeBias, causal_bias
from training.model.proof import audit as audit_module
from training.model.proof.attention_weights import dtype_of, read_classes, read_rows, read_total
from training.model.proof.audit import LengthAudit, audit, sample_heads

HEAD_DIM = 64
LIMITS = {dtype_of(name): row.row_tolerance for name, row in PRECISIONS.items() if not row.gpu_only}


def measured(backend: str, dtype: torch.dtype, *, heads: int, length: int) -> LengthAudit:
    cpu = torch.device("cpu")
    return audit(backend, slopes=slopes(heads), head_dim=HEAD_DIM, length=length, dtype=dtype, device=cpu)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_is_within_the_limit(backend: str, dtype: torch.dtype) -> None:
    for heads, length in ((16, 4096), (112, 1024)):
        audited = measured(backend, dtype, heads=heads, length=length)
        assert [head.head for head in audited.heads] == list(range(heads)), length
        assert 0 < audited.worst.measured.worst <= LIMITS[dtype], length


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_rows_are_within_the_limit(backend: str, dtype: torch.dtype) -> None:
    for heads, length in ((16, 16_384), (112, 65_536)):
        audited = measured(backend, dtype, heads=heads, length=length)
        assert audited.queries >= 8
        assert (audited.density is None) == (backend == "reference")
        assert audited.density is None or audited.density < 0.3, "far keys without weight are left out, and it is exact"
        assert {slopes(heads)[head.head] for head in audited.heads} >= {max(slopes(heads)), min(slopes(heads))}
        assert 0 < audited.worst.measured.worst <= LIMITS[dtype], (heads, length)


@pytest.mark.parametrize(("length", "lost"), [(1024, 0.33), (2048, 0.47), (4096, 0.61)])
def test_slope_times_key_in_bf16_loses_the_sharpest_head(length: int, lost: float) -> None:
    sharpest = measured("reference", torch.bfloat16, heads=16, length=length).heads[0]
    assert sharpest.slope == 2**-0.5
    assert sharpest.absolute.mean == pytest.approx(lost, rel=0.15)
    assert sharpest.relative.worst < 3e-3


def test_slope_times_key_is_over_the_limit_even_in_fp32() -> None:
    found = measured("reference", torch.float32, heads=16, length=16_384)
    assert max(head.absolute.worst for head in found.heads) > 10 * LIMITS[torch.float32]


# Faults, each as a change to the right bias.
BROKEN = {
    "rounded to bf16": lambda right: right.bfloat16().float(),
    "wrong sign": lambda right: torch.where(right.isinf(), right, -right),
    "off by one key": lambda right: right.roll(1, -1).masked_fill(right.isinf(), -torch.inf),
    "none": lambda right: torch.where(right.isinf(), right, 0.0),
    "nan": lambda right: right * torch.nan,
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_bias_is_over_the_limit(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "causal_bias", lambda *args, **keys: BROKEN[fault](causal_bias(*args, **keys)))
    found = measured("sdpa", torch.float32, heads=4, length=512)
    assert found.worst.measured.worst > LIMITS[torch.float32]


def test_an_audit_says_the_windows_that_its_rows_need() -> None:
    cpu, keys = torch.device("cpu"), {"slopes": slopes(8), "head_dim": HEAD_DIM, "length": 2048, "dtype": torch.float32}
    audited = audit("sdpa", **keys, device=cpu)  # type: ignore[arg-type]
    whole = audit("sdpa", **keys, device=cpu, windows=False)  # type: ignore[arg-type]
    assert whole.density is None
    assert [head.window for head in whole.heads] == [head.window for head in audited.heads]
    assert audited.density is not None
    largest = [head.window.largest for head in audited.heads]
    assert largest == sorted(largest), "the flatter, the longer"
    assert largest[0] * 2**-1 > 18, "the logarithm of the limit at least"
    assert largest[-1] == 2048
    # the kernel takes whole blocks of queries and keys: never less than the rows need
    assert sum(head.window.share for head in audited.heads) / 8 <= audited.density < 0.9


def test_far_keys_read_as_one_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = measured("sdpa", torch.bfloat16, heads=4, length=2048)
    monkeypatch.setattr(audit_module, "FAR", 0.0)
    whole = measured("sdpa", torch.bfloat16, heads=4, length=2048)
    for one, other in zip(quick.heads, whole.heads, strict=True):
        assert one.measured.worst == pytest.approx(other.measured.worst, abs=1e-8)


@pytest.mark.parametrize(("keys", "first", "head_dim"), [(5, 0, 8), (64, 0, 8), (67, 0, 8), (67, 30, 8), (9, 8, 16)])
def test_rows_read_equal_the_softmax(keys: int, first: int, head_dim: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 3, seq, head_dim, dtype=torch.float64) for seq in (min(keys, 6), keys))
    slope = local_slopes(3, tensor=Group(0, 1, None))
    scores = q[0] @ k[0].mT / head_dim**0.5 + causal_bias(slope, queries=q.shape[2], keys=keys)
    expected = scores.softmax(-1)
    for backend in (Reference, Sdpa):
        attend = backend(SlopeBias(slope))
        torch.testing.assert_close(read_rows(attend, q, k, first=first), expected[..., first:], atol=1e-12, rtol=0)
        total = read_total(attend, q, k, before=first)
        torch.testing.assert_close(total, expected[..., :first].sum(-1), atol=1e-12, rtol=0)


def test_a_backend_is_given_values_that_do_not_overlap_in_memory() -> None:
    given: list[torch.Tensor] = []

    class Watching(Sdpa):
        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            given.append(v)
            return super().__call__(q, k, v)

    zero = torch.zeros(1, 3, 20, 8)
    attend = Watching(SlopeBias(None))
    read_rows(attend, zero, zero)
    read_classes(attend, zero, zero)
    assert len(given) == 2
    assert all(v.is_contiguous() for v in given)


def test_a_sample_of_heads_has_the_sharpest_and_the_flattest() -> None:
    whole = slopes(112)
    sample = sample_heads(whole, count=5)
    assert len(set(sample)) == 5
    assert {max(whole), min(whole)} <= {whole[head] for head in sample}
    assert sample_heads(slopes(3), count=5) == [0, 1, 2]
