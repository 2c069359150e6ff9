"""Tiles with weight by their scores, found by a Triton kernel in its interpreter, against a formula in fp64."""

import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from triton.errors import TritonError

from configs.positions import slopes
from parallel.documents import Documents
from training.model.kernels import flex, tiles
from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.kernels.tile_search import NEAREST_TILES, first_tiles_with_weight
from training.model.kernels.tiles import TILE, tiles_with_weight
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows, norms, share_limit

TILES = NEAREST_TILES + 2
SLOPES = torch.tensor([slopes(8)[0], slopes(12)[5], slopes(8)[7]], dtype=torch.float64)  # steep, middle, flat
HALF = torch.float16  # the interpreter multiplies bf16 as if it were whole numbers
LIMIT = share_limit(HALF) / 2  # what those keys may weigh that are looked at; as much is for those out of reach
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # an example takes half a second
KINDS = ("random", "loud key", "equal scores", "zero queries", "opposed", "unseen")


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    window: int | None
    starts: Tensor | None


def make_case(kind: str, *, seed: int, scale: float, head_dim: int, window: int | None, documents: bool) -> Case:
    generator = torch.Generator().manual_seed(seed)
    q, k = scale * torch.randn(2, 1, TILES * TILE, len(SLOPES), head_dim, generator=generator)
    if kind == "loud key":
        k[:, TILE + 5] *= 30
    elif kind == "equal scores":
        k = k[:, :1].expand_as(k).clone()
    elif kind == "zero queries":
        q = 0 * q
    elif kind == "opposed":
        q[..., 0] += 6
        k[..., 0] -= 6
        k[:, : 2 * TILE, :, 0] += 12
    elif kind == "unseen":  # keys are large where no query looks
        q[..., 1] = 0
        k[..., 1] = 200
    starts = None
    if documents:
        starts = torch.zeros(1, TILES * TILE, dtype=torch.long)
        for begin in (1, 300, TILE * 4):
            starts[:, begin:] = begin
    return Case(*(x.to(HALF).transpose(1, 2) for x in (q, k)), window, starts)  # as a projection leaves them


def search(case: Case, *, heads: slice = slice(None)) -> Tensor:
    """Return the first tiles with weight of some heads, each of which takes a tenth of a second."""
    (q, k), window, starts = (x[:, heads] for x in case[:2]), *case[2:]
    radius = F.pad(norms(k.unflatten(2, (TILES, TILE))).amax(3).cummax(2).values[:, :, :-1], (1, 0))
    found: Tensor = first_tiles_with_weight(q, k, radius, SLOPES[heads].float(), window, starts, TILE)
    return found.long()


def scores_of(case: Case) -> tuple[Tensor, Tensor]:
    """Return q.k / sqrt(d) without a bias, and what a query does not see, [batch, heads or 1, queries, keys]."""
    q, k, window, starts = case
    place = torch.arange(q.shape[2])
    hidden = (place > place[:, None]) | (place[:, None] - place >= (window or len(place)))
    hidden = hidden if starts is None else hidden | (place < starts[:, None, :, None])
    return q.double() @ k.double().mT / q.shape[3] ** 0.5, hidden.expand(1, 1, -1, -1)


def first_by_formula(case: Case, *, limits: tuple[float, float]) -> list[Tensor]:
    """Return the first tile that weighs more than each limit with those before it, in fp64, [batch, heads, tiles]."""
    products, hidden = scores_of(case)
    place = torch.arange(products.shape[3])
    slope = SLOPES[:, None, None]
    near = place[:, None] // TILE - place // TILE < NEAREST_TILES
    sums = (products - slope * (place[:, None] - place)).masked_fill(hidden | ~near, -torch.inf).logsumexp(3)
    largest = products.unflatten(3, (TILES, TILE)).amax(4)
    nearest = place[:, None] - (torch.arange(TILES) + 1) * TILE + 1
    several = (1 - (-slope * TILE).exp()) / (1 - (-slope).exp())
    shares = several * (largest - slope * nearest - sums[..., None]).exp()
    longest = case.q.double().norm(dim=3)[..., None] * case.k.double().norm(dim=3).cummax(2).values[:, :, None]
    beyond = (longest / case.q.shape[3] ** 0.5 - slope * (place[:, None] - place) - sums[..., None]).exp()
    beyond /= 1 - (-slope).exp()  # by the largest norm up to a key, not up to the row: more than the kernel knows
    firsts = []
    for limit in limits:
        gone = ((beyond <= limit) | hidden).unflatten(2, (TILES, TILE)).unflatten(4, (TILES, TILE)).all(5).all(3)
        start = torch.arange(TILES).expand_as(gone).masked_fill(gone, TILES).amin(3)  # of each row, its first in reach
        looked_at = torch.arange(TILES) >= start[..., None]
        spent = (shares.unflatten(2, (TILES, TILE)) * looked_at[:, :, :, None]).cumsum(4)
        heavy = (spent > limit).any(3) & looked_at
        firsts.append(torch.arange(TILES).expand_as(heavy).masked_fill(~heavy, TILES).amin(3))
    return [torch.minimum(first, torch.arange(TILES)) for first in firsts]


cases = st.builds(
    make_case,
    st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
    head_dim=st.sampled_from([16, 24]),
    window=st.sampled_from([None, 300]),
    documents=st.booleans(),
)


@example(make_case("zero queries", seed=0, scale=1.0, head_dim=16, window=None, documents=False))
@settings(max_examples=8, phases=WITHOUT_SHRINKING)
@given(case=cases)
def test_what_is_left_out_has_no_weight(case: Case) -> None:
    first = search(case)
    lowest, highest = first_by_formula(case, limits=(0.95 * LIMIT, 1.05 * LIMIT))
    assert (lowest <= first).all()
    assert (first <= highest).all()
    products, hidden = scores_of(case)
    place = torch.arange(products.shape[3])
    biased = products - SLOPES[:, None, None] * (place[:, None] - place)
    weights = biased.masked_fill(hidden, -torch.inf).softmax(3)
    left_out = place // TILE < first.repeat_interleave(TILE, 2)[..., None]
    assert weights.masked_fill(~left_out, 0).sum(3).max() <= share_limit(HALF)


@pytest.mark.parametrize(("part", "left_out"), [(0.9, 1), (0.45, 2), (0.3, 3), (0.23, 4), (1.1, 0)])
def test_the_weights_of_tiles_add_up(part: float, left_out: int) -> None:
    # The last row's far tiles, all but two, weigh the same: scores grow with the distance as the penalty does.
    case = make_case("zero queries", seed=0, scale=1.0, head_dim=16, window=None, documents=False)
    head, row, slope = 1, TILES - 1, SLOPES[1].item()
    case.q[0, head, :, 0] = 4.0  # the root of head_dim: scores are the keys' first numbers
    case.k[0, head] = 0
    own, tile = (1 - math.exp(-slope * count) for count in (TILE + 1, TILE))  # keys with scores of 0; as many as a tile
    level = math.log(part * LIMIT * own / tile) - slope * (TILE - 1)  # a tile counts as its best score so often
    place = torch.arange((row - 1) * TILE)
    case.k[0, head, : len(place), 0] = (slope * (row * TILE - place) + level).to(HALF)
    case.q[0, head, : row * TILE] = 0
    assert search(case, heads=slice(head, head + 1))[0, 0, row] == left_out


@pytest.mark.parametrize("hidden_by", ["document", "window"])
def test_keys_that_are_not_seen_count_for_nothing(hidden_by: str) -> None:
    case = make_case("zero queries", seed=0, scale=1.0, head_dim=16, window=None, documents=False)
    row = TILES - 1
    case.q[..., 0] = 4.0
    case.k[:, :, (row - 2) * TILE, 0] = 30.0  # nearly all weight, if it were seen
    if hidden_by == "window":
        case = case._replace(window=TILE)
    else:
        case = case._replace(starts=torch.arange(TILES * TILE)[None] // TILE // (row - 1) * (row - 1) * TILE)
    assert (search(case, heads=slice(1, 3))[0, :, row] == row - 1).all()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("which", "bad"), [*product(("query", "key", "near key"), (torch.nan, torch.inf)), ("none", 0.0)]
)
def test_all_tiles_are_taken_where_a_number_is_not_finite(which: str, bad: float) -> None:
    case = make_case("zero queries", seed=0, scale=1.0, head_dim=16, window=None, documents=False)
    row, steep = TILES - 1, 0
    where = {"query": (case.q, row * TILE + 7), "key": (case.k, 5), "near key": (case.k, row * TILE - 1)}
    if which in where:
        tensor, place = where[which]
        tensor[0, steep, place, 3] = bad
    assert (search(case, heads=slice(steep, steep + 1))[0, 0, row] == 0) == (which in where)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("documents", [False, True])
def test_flex_computes_the_tiles_with_weight(monkeypatch: pytest.MonkeyPatch, documents: bool) -> None:
    monkeypatch.setattr(flex, "FEWEST_TILES_OF_WINDOWS", TILES)
    q, k, _, starts = make_case("unseen", seed=3, scale=1.0, head_dim=16, window=None, documents=documents)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(4)).to(HALF)
    inside = None if starts is None else Documents(starts == torch.arange(TILES * TILE), device=q.device)
    densities = {}
    for by_scores in (True, False):
        bias = SlopeBias(SLOPES)
        bias.lossless = LosslessWindows(by_scores=by_scores)
        found = Flex(bias)(q, k, v, inside)
        expected = Reference(bias)(q.double(), k.double(), v.double(), inside)
        torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-3)
        (densities[by_scores],) = bias.lossless.take()
    assert densities[True] < densities[False] < 1


@torch.no_grad()
def test_tiles_are_found_by_norms_where_the_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise TritonError("out of resource: shared memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(tiles, "first_tiles_with_weight", fails)
    find, (q, k) = tiles.TileFinder(), torch.randn(2, 1, len(SLOPES), 3, TILE, 16).to(HALF)
    expected = tiles_with_weight(q, k, SLOPES.float(), None)
    for _ in range(2):
        assert all(map(torch.equal, find(q, k, SLOPES.float(), None, None, True), expected))


@torch.no_grad()
def test_one_trace_searches_all_lengths() -> None:
    traced = torch.compile(tiles_with_weight, fullgraph=True, backend="eager")
    counters.clear()
    for count in (2, 5, 3):
        q, k = torch.randn(2, 1, len(SLOPES), count, TILE, 16, generator=torch.Generator().manual_seed(count)).to(HALF)
        for x in (q, k):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        found, expected = (find(q, k, SLOPES.float(), None, None, True) for find in (traced, tiles_with_weight))
        assert all(map(torch.equal, found, expected))
    assert counters["stats"]["unique_graphs"] == 1
