"""The sliding window of `model.window`: a formula in fp64, tensor ranks, caches, its cost, and the certificate."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from configs.positions import POSITIONS, T5_BUCKETS, slopes
from configs.schema import Model
from parallel.axes import Group
from parallel.groups import lone_groups
from parallel.shards import declared
from tests.support.bloom_formula import bloom_logits, cross_entropy
from tests.support.models import LAYERS, VOCABULARY, learned_bias, make_decoder, weights_of
from training.model.cache import KeyValueCache
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.bias import QUERY_BLOCK, Bias, SlopeBias, within
from training.model.positions.method import make_position
from training.model.positions.sinusoidal import sinusoids
from training.model.positions.t5 import MAX_DISTANCE
from training.model.proof.certificate import LONG, LONGEST_EDGE, WrongPositions, certify
from training.model.single import SingleModel
from training.model.windows import LosslessWindows

HEADS, CPU, WHOLE = 3, torch.device("cpu"), Group(0, 1, None)
LENGTH = QUERY_BLOCK + 45


def distances(queries: int, keys: int) -> Tensor:
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)


def bias_of(position: str, *, window: int | None, heads: int = HEADS, tensor: Group = WHOLE) -> Bias:
    if position == "t5":
        learned = learned_bias(heads, tensor=tensor)
        whole = torch.randn(heads, T5_BUCKETS, generator=torch.Generator().manual_seed(heads))
        learned.weight.data = whole.chunk(tensor.size)[tensor.rank].clone()
        bias: Bias = learned
    else:
        bias = make_position(Model(layers=1, hidden=heads, heads=heads, position=position), {}, tensor=tensor).bias
    bias.window, bias.lossless = window, LosslessWindows()
    return bias


def random_qkv(queries: int, keys: int, *, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(1, heads, queries, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 1, heads, keys, 8, dtype=torch.float64, generator=generator)
    return q, k, v


Formula = Callable[[Tensor], Tensor]


def formula_of(position: str, weights: dict[str, Tensor]) -> tuple[Tensor, Formula | None, Formula | None]:
    """Return a method's penalties [heads, LENGTH, LENGTH], and what it does to embeddings and to queries and keys."""
    distance, hidden = distances(LENGTH, LENGTH).double(), 8 * HEADS
    none = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    if position == "alibi":
        return -torch.tensor(slopes(HEADS), dtype=torch.float64)[:, None, None] * distance, None, None
    if position == "t5":
        buckets = T5Attention._relative_position_bucket(
            -distance.long(), bidirectional=False, num_buckets=T5_BUCKETS, max_distance=MAX_DISTANCE
        )
        return weights["positions.t5.weight"][:, buckets], None, None
    if position == "kerple":
        r1, r2 = weights["positions.kerple.weight"].exp()[:, :, None, None].unbind(1)
        return -r1 * torch.log(1 + r2 * distance.clamp(min=0)), None, None
    if position == "sandwich":
        waves = sum(torch.cos(distance / 10000 ** (2 * pair / 128)) for pair in range(64))
        return torch.stack([waves / (8 * head / HEADS) for head in range(1, HEADS + 1)]), None, None
    if position == "sinusoidal":
        table = sinusoids(LENGTH, hidden=hidden, device=CPU).double()
        return none, lambda x: x * math.sqrt(hidden) + table, None
    if position == "rotary":
        rates = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angles = (torch.arange(LENGTH, dtype=torch.float64)[:, None] * rates).repeat(1, 2)[None]
        return none, None, lambda x: apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())[0]
    return none, None, None


@pytest.mark.parametrize("position", POSITIONS)
def test_decoder_within_a_window_equals_the_formula(position: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for window in (1, 100):
        decoder = make_decoder(HEADS, position=position, window=window).double()
        weights = weights_of(decoder)
        penalty, embedded, turned = formula_of(position, weights)
        penalty = penalty.masked_fill(distances(LENGTH, LENGTH) >= window, -math.inf)
        expected = bloom_logits(
            weights, inputs, layers=LAYERS, heads=HEADS, penalty=penalty, embedded=embedded, turned=turned
        )
        logits = decoder(inputs)
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
        for some in (logits, expected):
            cross_entropy(some, targets).backward()
        for name, (parameter, _) in declared(decoder).items():
            torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("position", ["alibi", "t5", "none"])
def test_sdpa_within_a_window_equals_the_reference(position: str) -> None:
    shapes = ((1, 1), (6, 6), (1, 301), (13, 301), (301, 301))
    for window, queries, keys in (
        *((window, *shape) for window in (1, 5, 256, 300) for shape in shapes),
        (1, 530, 530),
    ):
        bias, results = bias_of(position, window=window), []
        for make in (Reference, Sdpa):
            inputs = [x.requires_grad_() for x in random_qkv(queries, keys)]
            out = make(bias)(*inputs)
            weighting = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
            results.append([out, *torch.autograd.grad((out * weighting).sum(), inputs)])
        for expected, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0, msg=f"{window}, {queries}, {keys}")


@pytest.mark.parametrize("kernel", [Reference, Sdpa])
@pytest.mark.parametrize("position", ["alibi", "t5", "none"])
@torch.no_grad()
def test_keys_outside_the_window_change_nothing(position: str, kernel: type[Reference] | type[Sdpa]) -> None:
    queries, keys, window = 3, 400, 90
    attend = kernel(bias_of(position, window=window))
    q, k, v = random_qkv(queries, keys)
    before = attend(q, k, v)
    first = keys - queries - window + 1  # that the first query sees
    for some in (k, v):
        some[:, :, :first] = 1e4
    assert torch.equal(attend(q, k, v), before)
    v[:, :, first] = 1e4
    changed = (attend(q, k, v) != before).any(3)
    assert bool(changed[:, -1, 0].all())  # of the flattest head; the steepest may give this key no weight
    assert not bool(changed[:, :, 1:].any())


@torch.no_grad()
def test_a_window_of_the_whole_length_is_none_at_all() -> None:
    inputs = random_qkv(300, 300)
    for position in ("alibi", "t5", "none"):
        whole, wide = (Sdpa(bias_of(position, window=window))(*inputs) for window in (None, 300))
        assert torch.equal(whole, wide), position


@pytest.mark.parametrize("position", ["alibi", "t5"])
@torch.no_grad()
def test_slices_of_tensor_ranks_join_to_the_whole(position: str) -> None:
    q, k, v = random_qkv(300, 300, heads=6)
    whole = Sdpa(bias_of(position, window=77, heads=6))(q, k, v)
    for size in (2, 3):
        attends = [Sdpa(bias_of(position, window=77, heads=6, tensor=Group(rank, size, None))) for rank in range(size)]
        chunks = zip(*(x.chunk(size, dim=1) for x in (q, k, v)), strict=True)
        parts = [attend(*chunk) for attend, chunk in zip(attends, chunks, strict=True)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_a_cache_within_a_window_equals_the_whole(position: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    decoder = make_decoder(HEADS, position=position, window=20).double()
    whole, cache = decoder.hidden(tokens), KeyValueCache()
    cuts = [0, 10, *range(17, 25), LENGTH - 4, *range(LENGTH - 3, LENGTH + 1)]
    parts = [decoder.hidden(tokens[:, start:end], cache) for start, end in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=0), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("position", ["alibi", "rotary"])
def test_fixed_shapes_within_a_window_equal_the_cache(position: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    parts = [tokens[:, :250], *tokens[:, 250:260].split(1, dim=1)]  # past the first size of the fixed buffers
    logits = []
    for capture in (None, lambda run: run):
        decoder = make_decoder(HEADS, position=position, window=33)
        model, cache = SingleModel(decoder, device=CPU, certificate={}, capture=capture), KeyValueCache()
        logits.append(torch.stack([model.next_logits(part, cache) for part in parts]))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


class Watched(SlopeBias):
    """A bias that notes the widths that it is asked for."""

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        widths.append(keys)
        return super().__call__(rows=rows, keys=keys, device=device, dtype=dtype)


widths: list[int] = []


@torch.no_grad()
def test_scores_and_bias_grow_with_the_length_not_its_square() -> None:
    widths.clear()
    bias, lengths, window = Watched(None), (2048, 4096, 8192), 100
    bias.window, bias.lossless = window, LosslessWindows()
    for length in lengths:
        Sdpa(bias)(*(x.float() for x in random_qkv(length, length, heads=1)))
        Sdpa(bias)(*(x.float() for x in random_qkv(1, length, heads=1)))
    shares = [float(share) for share in bias.lossless.take()]
    assert max(widths) < QUERY_BLOCK + window + 16
    # a share is of all scores up to the end of each block of queries
    scores = [share * length * (length + QUERY_BLOCK) / 2 for share, length in zip(shares[::2], lengths, strict=True)]
    per_token = [score / length for score, length in zip(scores, lengths, strict=True)]
    assert per_token == pytest.approx([QUERY_BLOCK + window] * len(lengths), rel=0.06)
    assert [share * length for share, length in zip(shares[1::2], lengths, strict=True)] == pytest.approx([112] * 3)


def model_of(position: str, *, window: int | None, windows: str = "auto") -> Model:
    return Model(layers=LAYERS, hidden=8 * HEADS, heads=HEADS, position=position, window=window, windows=windows)


def error_of(position: str, backend: str, *, window: int, built: int | None) -> float:
    """Return the certificate's error of a model with a window, whose attention was built with another."""
    decoder = make_decoder(HEADS, position=position, backend=backend, window=built)
    model = model_of(position, window=window).model_copy(update={"attention": backend})
    (found,) = certify(decoder, model, groups=lone_groups(), precision="fp32", device=CPU)
    return found.error


@torch.no_grad()
def test_the_certificate_sees_another_window() -> None:
    for position, backend, window, built in (
        ("alibi", "sdpa", 1, 2),
        ("t5", "sdpa", 40, None),
        ("none", "reference", 300, 301),
        ("alibi", "sdpa", LONG + 100, LONG + 99),
        ("rotary", "reference", LONG + 100, None),
    ):
        assert error_of(position, backend, window=window, built=window) < 2e-6
        with pytest.raises(WrongPositions, match="from what its position method promises"):
            error_of(position, backend, window=window, built=built)


@torch.no_grad()
def test_a_window_too_long_to_read_is_certified_inside() -> None:
    window = 2**53
    assert window > LONGEST_EDGE
    assert error_of("none", "sdpa", window=window, built=window) < 1e-6


def test_what_is_left_out_is_counted_where_something_may_be() -> None:
    for position, window, windows, is_counted in (
        ("alibi", None, "auto", True),
        ("alibi", None, "off", False),
        ("alibi", 9, "off", False),
        ("none", None, "auto", False),
        ("rotary", 9, "auto", True),
        ("rotary", 9, "off", True),
    ):
        bias = make_position(model_of(position, window=window, windows=windows), {}, tensor=WHOLE).bias
        assert (bias.lossless is not None, bias.window) == (is_counted, window), (position, window, windows)


def test_a_windowed_strip_is_minus_infinity_from_the_window_on() -> None:
    for queries, keys, window in ((1, 1, 1), (3, 10, 4), (10, 10, 1), (5, 9, 9), (5, 9, None)):
        strip = within(torch.zeros(2, queries, keys), window=window)
        outside = distances(queries, keys) >= (window or keys)
        assert torch.equal(strip, torch.zeros(2, queries, keys).masked_fill(outside, -torch.inf))
