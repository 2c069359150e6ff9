"""The parts of a fast step on a GPU, each against plain torch: `make test-gpu`."""

from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.positions import POSITIONS
from parallel.axes import Group
from parallel.compiled import make_compile
from parallel.fused import add_and_normalize, add_to_residual, gelu_exact, gelu_tanh, normalize, split_heads
from parallel.head import Head
from parallel.weight_gradient import add_product, adds_in_product
from tests.support.models import VOCABULARY, make_wandering_decoder
from training.generation import continue_tokens
from training.model.decoding import SMALLEST
from training.model.kernels import next_token
from training.model.kernels.next_token import FEWEST_KEYS
from training.model.single import SingleModel
from training.sampling import Sampling

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HIDDEN = 256


@pytest.mark.parametrize("compiles", ["on", "off"])
def test_the_loss_in_chunks_equals_cross_entropy(compiles: str) -> None:
    tokens, rows, padding = 3000, 50_304, 47  # two chunks, the second one smaller
    torch.manual_seed(0)
    x = torch.randn(tokens, 1, HIDDEN, device=CUDA).bfloat16().requires_grad_()
    weight = nn.Parameter((0.05 * torch.randn(rows, HIDDEN, device=CUDA)).bfloat16())
    targets = torch.randint(0, rows - padding, (1, tokens), device=CUDA)
    embedding = SimpleNamespace(weight=weight, padding=padding, vocab_start_index=0)
    exact_x, exact_weight = (value.detach().float().requires_grad_() for value in (x, weight))
    expected = F.cross_entropy(exact_x[:, 0] @ exact_weight[: rows - padding].t(), targets[0])
    compiled = make_compile(compiles, device=CUDA)
    loss = Head(tensor=Group(0, 1, None), compiled=compiled).loss(embedding, x, targets)
    torch.testing.assert_close(loss, expected, atol=2e-3, rtol=1e-3)
    loss.backward()
    expected.backward()
    for found, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert exact is not None
        assert (found.float() - exact).norm() <= 1e-2 * exact.norm()


def test_weight_gradients_add_up_in_fp32() -> None:
    torch.manual_seed(0)
    total = torch.zeros(512, HIDDEN, device=CUDA)
    exact = torch.zeros(512, HIDDEN, device=CUDA, dtype=torch.float64)
    for _ in range(20):
        gradient, x = (torch.randn(1024, width, device=CUDA).bfloat16() for width in (512, HIDDEN))
        add_product(total, gradient, x)
        exact += gradient.double().t() @ x.double()
    error = ((total.double() - exact).norm() / exact.norm()).item()
    # a product that is rounded to 16 bits before it is added has an error of about 2e-3
    assert error < (1e-5 if adds_in_product("cuda", torch.bfloat16) else 3e-3)


@pytest.mark.parametrize("word", ["on", "triton"])
def test_the_fused_functions_equal_the_plain_ones(word: str) -> None:
    compiled = make_compile(word, device=CUDA)
    for function, (states, vectors, more) in FUSED.items():
        for rows in (256, 1001):
            torch.manual_seed(0)
            plain = [torch.randn(rows, WIDTH, device=CUDA) for _ in range(states)]
            plain += [torch.randn(WIDTH, device=CUDA) for _ in range(vectors)]
            results = [_with_gradients(each, plain, more) for each in (function, compiled(function))]
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("word", ["on", "triton"])
def test_fused_functions_take_more_than_2_to_the_31_elements(word: str) -> None:
    compiled = make_compile(word, device=CUDA)
    rows, width = 66_000, 33_000
    x = torch.zeros(rows, width, device=CUDA, dtype=torch.bfloat16)
    x[-1] = torch.linspace(-3, 3, width, device=CUDA)
    for function in (gelu_tanh, gelu_exact):
        found = compiled(function)(x, None)
        torch.testing.assert_close(found[-1], function(x[-1], None))
        assert not found[0].any()


WIDTH = 384  # 4 heads of 32
# states and vectors that each takes, and what it takes after them
FUSED: dict[Callable[..., Any], tuple[int, int, tuple[Any, ...]]] = {
    normalize: (1, 2, (1e-5,)),
    add_to_residual: (2, 1, ()),
    add_and_normalize: (2, 3, (1e-5,)),
    split_heads: (1, 1, (4,)),
    gelu_tanh: (1, 1, ()),
    gelu_exact: (1, 1, ()),
}


def _with_gradients(called: Callable[..., Any], values: list[Tensor], more: tuple[Any, ...]) -> list[Tensor]:
    arguments = [nn.Parameter(value) if value.ndim == 1 else value.clone().requires_grad_() for value in values]
    results = called(*arguments, *more)
    results = list(results) if isinstance(results, tuple) else [results]
    gradients = torch.autograd.grad(sum(result.sin().sum() for result in results), arguments)
    return [*results, *gradients]


@pytest.mark.parametrize(
    ("position", "precision", "fewest"),
    [
        *((position, "fp32", FEWEST_KEYS) for position in POSITIONS),
        *(("alibi", precision, SMALLEST) for precision in ("fp32", "bf16")),  # by parts
    ],
)
def test_captured_decoding_gives_the_same_tokens(
    position: str, precision: str, fewest: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(next_token, "FEWEST_KEYS", fewest)
    prompt = torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = []
    for capture in (None, lambda run: run):  # None: a CUDA graph
        decoder = make_wandering_decoder(position=position)
        model = SingleModel(decoder, device=CUDA, certificate={}, precision=precision, capture=capture)
        texts.append(list(islice(continue_tokens(model, prompt, sampling=Sampling(), end=None), 60)))
    assert texts[0] == texts[1]
    assert not caplog.messages  # such as that nothing could be captured
