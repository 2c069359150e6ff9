"""The parts of a fast step on a GPU, each against plain torch: `make test-gpu`."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.positions import POSITIONS
from parallel.axes import Group
from parallel.compiled import make_compile
from parallel.head import Head
from parallel.weight_gradient import add_product, adds_in_product
from tests.support.fused import FUSED_CASES
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


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
OF_BLOOM = ("norm", "residual norm", "norm of kept states", "residual", "heads", "tanh")


@pytest.mark.parametrize(("word", "dtype"), [("on", torch.float32), ("triton", torch.bfloat16)])
@pytest.mark.parametrize("name", OF_BLOOM)
def test_the_fused_functions_equal_the_plain_ones(word: str, dtype: torch.dtype, name: str) -> None:
    require_equal(name, word=word, dtype=dtype, rows=20_000, width=384)  # programs take many rows


@pytest.mark.slow
@pytest.mark.parametrize("word", ["on", "triton"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_functions_of_any_kind_equal_the_plain_ones(word: str, dtype: torch.dtype, name: str) -> None:
    for rows, width in ((1001, 75), (20_000, 384)):
        require_equal(name, word=word, dtype=dtype, rows=rows, width=width)


def require_equal(name: str, *, word: str, dtype: torch.dtype, rows: int, width: int) -> None:
    case = FUSED_CASES[name]
    values = [None if x is None else x.to(dtype) for x in case.arguments(rows=rows, width=width, device=CUDA)]
    function = make_compile(word, device=CUDA)(case.function)
    found = case.results(function, values, dtype=dtype, lies_otherwise=width % 2 == 1)
    exact = case.results(case.function, values, dtype=torch.float64, lies_otherwise=False)
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() <= LIMITS[dtype] * other.norm()


@pytest.mark.parametrize("word", [pytest.param("on", marks=pytest.mark.slow), "triton"])
def test_fused_functions_take_more_than_2_to_the_31_elements(word: str) -> None:
    compiled = make_compile(word, device=CUDA)
    rows, width = 720_000, 9 * 333  # 4.3 GB
    for name in ("norm without bias", "exact without bias", "heads without bias"):
        case = FUSED_CASES[name]
        x = torch.zeros(rows, width, device=CUDA, dtype=torch.bfloat16)
        x[-1] = torch.linspace(-3, 3, width)
        rest = (torch.ones_like(x[0]), None) if "norm" in name else (None,)
        seen = []
        for states, function in ((x[-1:].clone(), case.function), (x, compiled(case.function))):
            results = function(states.requires_grad_(), *rest, *case.more)
            results = results if isinstance(results, tuple) else (results,)
            gradients = torch.autograd.grad(results, states, [result.detach().square() for result in results])
            seen.append([part[-1].clone() for part in (*results, *gradients)])
        for one, other in zip(*seen, strict=True):
            torch.testing.assert_close(one, other, atol=3e-2, rtol=2e-2)


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
