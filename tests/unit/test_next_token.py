"""The next token's attention by parts, Triton kernels in their interpreter, against a formula in fp64."""

import math

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.positions import slopes
from tests.support.models import VOCABULARY, make_wandering_decoder
from training.model import decoding
from training.model.cache import KeyValueCache
from training.model.decoding import SMALLEST
from training.model.kernels import next_token
from training.model.kernels.next_token import NEAREST_KEYS, Parts
from training.model.positions.bias import SlopeBias
from training.model.single import SingleModel
from training.model.windows import norms, share_limit

SIZE, HEADS = 512, 3
STEP = 8  # keys
SLOPES = torch.tensor([slopes(8)[0], slopes(8)[3], slopes(8)[7]], dtype=torch.float64)  # steep, middle, flat
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # an example takes a tenth of a second
KINDS = ("random", "loud key", "equal keys", "zero query", "opposed")


def buffers(
    position: int, *, kind: str = "random", seed: int = 0, scale: float = 1.0, head_dim: int = 24, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and keys and values that are set up to its own; after it they are nan."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = scale * torch.randn(3, 1, SIZE, HEADS, head_dim, generator=generator)
    if kind == "loud key":
        k[:, position // 3] *= 30
    elif kind == "equal keys":  # and the query: the bound is tight
        k = q[:, position : position + 1].expand_as(k).clone()
    elif kind == "zero query":
        q = 0 * q
    elif kind == "opposed":
        q[..., 0] += 6
        k[..., 0] -= 6
        k[:, : position // 2, :, 0] += 12
    k[:, position + 1 :], v[:, position + 1 :] = torch.nan, torch.nan
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return q[:, :, position : position + 1], k.contiguous(), v.contiguous()


def radius_before(keys: Tensor, position: int) -> Tensor:
    return norms(keys[:, :, :position]).amax(2, keepdim=True) if position else torch.zeros(1, HEADS, 1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, *, bias: SlopeBias, position: int, radius: Tensor | None = None
) -> Tensor:
    return Parts(bias, keys)(q, keys, values, position=torch.tensor([position]), radius=radius)


def formula(q: Tensor, keys: Tensor, values: Tensor, *, slope: Tensor, position: int, first: int = 0) -> Tensor:
    q, keys, values = q.double(), keys[:, :, first : position + 1].double(), values[:, :, first : position + 1].double()
    distance = position - torch.arange(first, position + 1)
    weights = (q @ keys.mT / q.shape[3] ** 0.5 - slope[:, None, None] * distance).softmax(3)
    return weights @ values


def rounding(dtype: torch.dtype, values: Tensor, *, position: int) -> float:
    """Return twice the rounding of the largest value: of the output, and of what leads to it."""
    return 2 * torch.finfo(dtype).eps * values[:, :, : position + 1].abs().max().item()


@pytest.mark.parametrize(
    ("dtype", "position"),
    [
        *((torch.float32, position) for position in (0, 1, NEAREST_KEYS, 63, 64, SIZE - 1)),
        (torch.float16, SIZE - 1),
        (torch.bfloat16, SIZE - 1),
    ],
)
def test_parts_equal_the_formula(dtype: torch.dtype, position: int) -> None:
    case = q, keys, values = buffers(position, dtype=dtype, head_dim=24 if position % 2 else 32)
    keys[:, :, position] *= 3  # the largest norm of all
    close = {"atol": rounding(dtype, values, position=position), "rtol": 0}
    bias, none, within = SlopeBias(SLOPES), SlopeBias(None), SlopeBias(SLOPES)
    within.window = 50
    expected = formula(*case, slope=SLOPES, position=position)
    out = attend(*case, bias=bias, position=position)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **close)
    radius = radius_before(keys, position)
    out = attend(*case, bias=bias, position=position, radius=radius)
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(radius, norms(keys[:, :, : position + 1]).amax(2, keepdim=True))
    out = attend(*case, bias=none, position=position)
    torch.testing.assert_close(out.double(), formula(*case, slope=0 * SLOPES, position=position), **close)
    out = attend(*case, bias=within, position=position)
    seen = formula(*case, slope=SLOPES, position=position, first=max(0, position - 49))
    torch.testing.assert_close(out.double(), seen, **close)


def test_parts_agree_where_the_newest_key_is_the_largest() -> None:
    position = SIZE - 1
    for seed in range(3):
        q, keys, values = buffers(position, seed=seed, dtype=torch.float32)
        keys[:, :, position] *= 3
        radius, bias = radius_before(keys, position), SlopeBias(SLOPES)
        found = [attend(q, keys, values, bias=bias, position=position, radius=radius) for _ in range(2)]  # it is raised
        assert torch.equal(*found)
        expected = formula(q, keys, values, slope=SLOPES, position=position)
        torch.testing.assert_close(found[0].double(), expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=12, phases=WITHOUT_SHRINKING)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
    position=st.integers(NEAREST_KEYS, SIZE - 1),
)
@example(kind="random", seed=0, scale=1.0, position=SIZE - 1)
@example(kind="loud key", seed=0, scale=1.0, position=SIZE - 1)
@example(kind="equal keys", seed=0, scale=1.0, position=SIZE - 1)
@example(kind="opposed", seed=0, scale=1.0, position=SIZE - 1)
def test_what_is_not_read_has_no_weight(kind: str, seed: int, scale: float, position: int) -> None:
    q, keys, values = buffers(position, kind=kind, seed=seed, scale=scale, head_dim=SIZE // STEP, dtype=torch.float32)
    steps = values.unflatten(2, (-1, STEP))
    steps.diagonal(dim1=2, dim2=4).fill_(torch.nan)  # keys of a step, in a number of their own
    out = attend(q, keys, values, bias=SlopeBias(SLOPES), position=position, radius=radius_before(keys, position))
    is_read = out[0, :, 0].isnan().repeat_interleave(STEP, dim=1)[:, : position + 1]  # [heads, keys], any of its step
    scores = q.double() @ keys[:, :, : position + 1].double().mT / q.shape[3] ** 0.5
    shares = (scores - SLOPES[:, None, None] * (position - torch.arange(position + 1))).softmax(3)[0, :, 0]
    assert shares.masked_fill(is_read, 0).sum(1).max() <= share_limit(torch.float32)
    if kind == "random" and scale < 3:
        assert is_read[0].sum() < 100, "the steep head reads few keys"
        assert is_read[2].all(), "the flat one all"


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_numbers_that_are_not_finite_reach_the_output(bad: float, where: str) -> None:
    position = SIZE - 1
    q, keys, values = buffers(position, dtype=torch.float32)
    if where == "query":
        q[:, :, :, 0] = bad
    else:
        keys[:, :, 0, 0] = bad
    out = attend(q, keys, values, bias=SlopeBias(SLOPES), position=position, radius=radius_before(keys, position))
    expected = formula(q, keys, values, slope=SLOPES, position=position)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("position", ["alibi", "rotary"])
@pytest.mark.parametrize(
    ("smallest", "fewest", "sizes"),
    [(SMALLEST, SMALLEST, [100, 1, 1, 50, 1, 7]), (64, 2 * 64, [20, *[1] * 44, 1, 1])],
    ids=["from the first token", "in larger buffers"],
)
def test_a_model_decodes_by_parts(
    position: str, smallest: int, fewest: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SMALLEST", smallest)
    tokens = torch.randint(3, VOCABULARY, (2, sum(sizes)), generator=torch.Generator().manual_seed(0))
    logits, caches = [], []
    for least in (math.inf, fewest):
        monkeypatch.setattr(next_token, "takes_parts", lambda _, keys, least=least: keys.shape[2] >= least)
        decoder = make_wandering_decoder(position=position)
        model = SingleModel(decoder, device=torch.device("cpu"), certificate={}, capture=lambda run: run)
        caches.append(KeyValueCache())
        logits.append(torch.stack([model.next_logits(part, caches[-1]) for part in tokens.split(sizes, dim=1)]))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)
    for block, radius in caches[1].radii.items():  # of prompts and single tokens in turn
        keys = caches[1].pairs[block][0][:, :, : tokens.shape[1]]
        torch.testing.assert_close(radius, norms(keys).amax(2, keepdim=True))
    assert len(caches[1].radii) == (2 if position == "alibi" else 0)
