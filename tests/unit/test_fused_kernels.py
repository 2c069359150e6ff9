"""Triton kernels of what lies between the matrix products, in Triton's interpreter, against plain torch in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.schema import Model
from parallel import fused, fused_kernels
from parallel.fused_kernels import FUSED_KERNELS
from parallel.groups import lone_groups
from parallel.head import Compile, as_it_is
from parallel.seeds import initial_weights
from parallel.start import start_alone
from tests.support.fused import EPSILON, FUSED_CASES, HEADS
from training.model.decoder import Decoder, plan_layers

VOCABULARY = 97


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program sum many rows, as it does with thousands of tokens."""
    monkeypatch.setattr(fused_kernels, "NORM_PROGRAMS", 5)
    monkeypatch.setattr(fused_kernels, "TILE_PROGRAMS", 6)
    monkeypatch.setattr(fused_kernels, "TILE_ELEMENTS", 512)
    monkeypatch.setattr(fused_kernels, "TILE_COLUMNS", 64)


@pytest.mark.parametrize("name", FUSED_CASES)
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (37, 75)])
def test_a_kernel_equals_its_function(name: str, rows: int, width: int) -> None:
    case = FUSED_CASES[name]
    for dtype, limit in ((torch.float32, 4e-6), (torch.float16, 2e-3)):  # the interpreter cuts bf16 off
        values = [None if value is None else value.to(dtype) for value in case.arguments(rows=rows, width=width)]
        found = case.results(FUSED_KERNELS[case.function], values, dtype=dtype, lies_otherwise=rows > 1)
        exact = case.results(case.function, values, dtype=torch.float64, lies_otherwise=False)
        assert len(found) == len(exact)
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == dtype
            assert one.shape == other.shape
            assert (one.double() - other).abs().max() <= limit * other.abs().max()


def test_no_tokens_are_no_error() -> None:
    for case in FUSED_CASES.values():
        values = case.arguments(rows=0, width=6)
        for result in case.results(FUSED_KERNELS[case.function], values, dtype=torch.float32, lies_otherwise=False):
            assert not result.any()


def test_states_passed_on_are_the_same_memory() -> None:
    x, weight = torch.randn(3, 16, dtype=torch.float16, requires_grad=True), torch.ones(16, dtype=torch.float16)
    passed, normalized = FUSED_KERNELS[fused.add_and_normalize](x, None, None, weight, None, EPSILON)
    assert passed.data_ptr() == x.data_ptr()
    assert normalized.grad_fn.saved_tensors[1].dtype == torch.float32  # mean and inverse standard deviation
    (gradient,) = torch.autograd.grad(passed.sum(), x)  # nobody used the norm
    assert torch.equal(gradient, torch.ones_like(x))


def _decoder(family: str, compiled: Compile, recompute: Any) -> Decoder:
    start_alone()
    model = Model(layers=2, hidden=24, heads=HEADS, family=family, init_std=0.3, embedding_init_std=0.3)
    tensor = lone_groups().tensor
    plan = plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute, compiled=compiled)
    decoder = Decoder(plan)
    initial_weights(decoder, seed=1, tensor=tensor)
    return decoder.train()


@pytest.mark.parametrize(("family", "recompute"), [("bloom", "selective"), ("mpt", True), ("jais", "selective")])
def test_a_decoder_of_kernels_has_the_same_gradients(family: str, recompute: Any) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled, recomputed in ((as_it_is, False), (_by_kernels, False), (_by_kernels, recompute)):
        decoder = _decoder(family, compiled, recomputed)
        loss = decoder(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in decoder.parameters())])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, atol=2e-6 * float(other.abs().max()), rtol=0)


def _by_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    return FUSED_KERNELS.get(function, function)
