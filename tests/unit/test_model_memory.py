"""What attention keeps for the backward pass: linear in the length, whatever the positions."""

import pytest
import torch

from parallel.groups import Group
from training.model.alibi import slopes
from training.model.attention import Reference, Sdpa
from training.model.bias import Bias, SlopeBias
from training.model.t5 import LearnedBias

HEADS = 4


def bias_of(position: str) -> Bias:
    if position == "t5":
        bias = LearnedBias(HEADS, init_std=1.0, tensor=Group(0, 1, None))
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
