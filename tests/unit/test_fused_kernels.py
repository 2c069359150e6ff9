"""Triton kernels of what lies between the matrix products, in Triton's interpreter, against plain torch in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Model
from parallel import fused, fused_kernels
from parallel.fused_kernels import FUSED_KERNELS
from parallel.groups import lone_groups
from parallel.head import Compile, as_it_is
from parallel.seeds import initial_weights
from parallel.start import start_alone
from training.model.decoder import Decoder, plan_layers

EPSILON, HEADS, VOCABULARY = 1e-5, 3, 97
STATE, PROJECTED, BIAS, PROJECTED_BIAS, NONE = "state", "projected", "bias", "projected bias", "none"
# what each takes, and its plain arguments
CASES: tuple[tuple[Callable[..., Any], tuple[str, ...], tuple[Any, ...]], ...] = (
    (fused.normalize, (STATE, BIAS, BIAS), (EPSILON,)),
    (fused.normalize, (STATE, BIAS, NONE), (EPSILON,)),
    (fused.add_and_normalize, (STATE, STATE, BIAS, BIAS, BIAS), (EPSILON,)),
    (fused.add_and_normalize, (STATE, STATE, NONE, BIAS, BIAS), (EPSILON,)),
    (fused.add_and_normalize, (STATE, STATE, NONE, BIAS, NONE), (EPSILON,)),
    (fused.add_and_normalize, (STATE, NONE, NONE, BIAS, BIAS), (EPSILON,)),
    (fused.add_to_residual, (STATE, STATE, BIAS), ()),
    (fused.add_to_residual, (STATE, STATE, NONE), ()),
    (fused.split_heads, (PROJECTED, PROJECTED_BIAS), (HEADS,)),
    (fused.split_heads, (PROJECTED, NONE), (HEADS,)),
    (fused.gelu_tanh, (STATE, BIAS), ()),
    (fused.gelu_exact, (STATE, BIAS), ()),
    (fused.gelu_exact, (STATE, NONE), ()),
)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program sum many rows, as it does with thousands of tokens."""
    monkeypatch.setattr(fused_kernels, "NORM_PROGRAMS", 5)
    monkeypatch.setattr(fused_kernels, "TILE_PROGRAMS", 6)
    monkeypatch.setattr(fused_kernels, "TILE_ELEMENTS", 512)
    monkeypatch.setattr(fused_kernels, "TILE_COLUMNS", 64)


def _arguments(kinds: tuple[str, ...], *, rows: int, width: int, dtype: torch.dtype) -> list[Tensor | None]:
    torch.manual_seed(rows)
    shapes = {STATE: (rows, width), PROJECTED: (rows, 3 * width), BIAS: (width,), PROJECTED_BIAS: (3 * width,)}
    # Far from zero, where a variance of squares minus the square of the mean would be lost.
    return [None if kind == NONE else (2 * torch.randn(shapes[kind]) + 3).to(dtype) for kind in kinds]


def _results(
    function: Callable[..., Any], values: list[Tensor | None], more: tuple[Any, ...], *, dtype: torch.dtype
) -> list[Tensor]:
    """Return the results of a function, and the gradients that it gives for random ones of its results."""
    leaves = [None if value is None else value.detach().to(dtype).requires_grad_() for value in values]
    results = function(*leaves, *more)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(0)
    # transposed, as an attention kernel gives some
    gradients = [torch.randn(*result.shape[1:], len(result), generator=generator).to(dtype) for result in results]
    torch.autograd.backward(results, [gradient.movedim(-1, 0) for gradient in gradients])
    return [*results, *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1].count(NONE)}")
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (37, 75)])
def test_a_kernel_equals_its_function(case: tuple[Any, ...], rows: int, width: int) -> None:
    function, kinds, more = case
    for dtype, limit in ((torch.float32, 4e-6), (torch.float16, 2e-3)):  # the interpreter cuts bf16 off
        values = _arguments(kinds, rows=rows, width=width, dtype=dtype)
        found = _results(FUSED_KERNELS[function], values, more, dtype=dtype)
        exact = _results(function, values, more, dtype=torch.float64)
        assert len(found) == len(exact)
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == dtype
            assert one.shape == other.shape
            assert (one.double() - other).abs().max() <= limit * other.abs().max()


def test_states_passed_on_are_the_same_memory() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.ones(16)
    passed, _ = FUSED_KERNELS[fused.add_and_normalize](x, None, None, weight, None, EPSILON)
    assert passed.data_ptr() == x.data_ptr()
    (gradient,) = torch.autograd.grad(passed.sum(), x)  # nobody used the norm
    assert torch.equal(gradient, torch.ones(3, 16))


def _decoder(family: str, compiled: Compile, recompute: Any) -> Decoder:
    start_alone()
    model = Model(layers=2, hidden=24, heads=HEADS, family=family, init_std=0.3, embedding_init_std=0.3)
    tensor = lone_groups().tensor
    plan = plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute, compiled=compiled)
    decoder = Decoder(plan)
    initial_weights(decoder, seed=1, tensor=tensor)
    return decoder.train()


@pytest.mark.parametrize(("family", "recompute"), [("bloom", "selective"), ("mpt", True)])
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
