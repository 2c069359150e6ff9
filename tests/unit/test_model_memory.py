"""The memory that attention keeps for the backward pass is linear in the length, with any position method."""

import pytest
import torch

from tests.support.models import learned_bias
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa, aligned
from training.model.positions.alibi import slopes
from training.model.positions.bias import QUERY_BLOCK, Bias, SlopeBias

HEADS = 4


def bias_of(position: str) -> Bias:
    if position == "t5":
        bias = learned_bias(HEADS)
        torch.nn.init.normal_(bias.weight)
        return bias
    return SlopeBias(torch.tensor(slopes(HEADS)) if position == "alibi" else None)


def kept_bytes(backend: Sdpa | Reference, length: int) -> int:
    """Return the bytes of all storages that one call keeps for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = (torch.randn(1, HEADS, length, 16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = backend(q, k, v)
        found = sum(kept.values())
        out.sum().backward()
    return found


@pytest.mark.parametrize("position", ["alibi", "t5", "none"])
def test_twice_the_length_keeps_twice_the_memory(position: str) -> None:
    short, long = (kept_bytes(Sdpa(bias_of(position)), length) for length in (1024, 2048))
    assert long < 2.3 * short
    assert long < HEADS * 2048 * 2048 * 4 / 2  # all scores, in fp32


@pytest.mark.parametrize("position", ["alibi", "t5"])
@pytest.mark.parametrize(("keys", "longer"), [(1024, 1024), (1024, 1001), (768, 4096), (1000, 1001)])
@torch.no_grad()
def test_a_gpu_reads_the_shared_strip_where_it_lies(position: str, keys: int, longer: int) -> None:
    bias = bias_of(position)
    place = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    bias(rows=QUERY_BLOCK, keys=longer, **place)  # a strip that is kept for a length asked for before
    strip = bias(rows=QUERY_BLOCK, keys=keys, **place)
    for seen in range(QUERY_BLOCK, keys + 1, QUERY_BLOCK):
        mask = strip[..., keys - seen :]
        assert aligned(mask) is mask, seen


@pytest.mark.parametrize("seen", [1, 15, 17, 1001])
def test_an_unaligned_mask_is_copied_into_aligned_rows(seen: int) -> None:
    strip = bias_of("alibi")(rows=9, keys=1008, device=torch.device("cpu"), dtype=torch.float32)
    mask = strip[..., 1008 - seen :]
    copied = aligned(mask)
    assert torch.equal(copied, mask)
    assert all(offset % 8 == 0 for offset in (copied.storage_offset(), *copied.stride()[:-1]))
    assert copied.data_ptr() != mask.data_ptr()


def test_a_backend_that_writes_all_scores_out_is_seen() -> None:
    short, long = (kept_bytes(Reference(bias_of("alibi")), length) for length in (512, 1024))
    assert long > 3 * short


def test_a_block_that_is_computed_again_has_the_same_gradients() -> None:
    gradients = []
    for backend in (Sdpa, Reference):
        torch.manual_seed(0)
        bias = bias_of("t5")
        q, k, v = (torch.randn(1, HEADS, 300, 16, requires_grad=True) for _ in range(3))
        (backend(bias)(q, k, v) * torch.randn(1, HEADS, 300, 16)).sum().backward()
        gradients.append([x.grad for x in (q, k, v, *bias.parameters())])  # type: ignore[attr-defined]
    for again, written_out in zip(*gradients, strict=True):
        torch.testing.assert_close(again, written_out, atol=1e-4, rtol=1e-4)
