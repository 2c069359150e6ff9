"""T5's positions against transformers' buckets, a table lookup and the decoder written out."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from configs.positions import T5_BUCKETS
from parallel.axes import Group
from parallel.shards import declared
from tests.support.bloom_formula import bloom_logits, cross_entropy
from tests.support.models import LAYERS, ONE_RANK, VOCABULARY, learned_bias, make_decoder, weights_of
from training.model.positions.t5 import MAX_DISTANCE, BucketBias, buckets

CPU = torch.device("cpu")


def their_buckets(relative: torch.Tensor) -> torch.Tensor:
    """Buckets of key position minus query position, as in T5's decoder."""
    found: torch.Tensor = T5Attention._relative_position_bucket(
        relative, bidirectional=False, num_buckets=T5_BUCKETS, max_distance=MAX_DISTANCE
    )
    return found


def looked_up(weight: torch.Tensor, *, rows: int, keys: int) -> torch.Tensor:
    """The bias of the last queries by indexing the table at each pair of positions, [heads, rows, keys]."""
    relative = torch.arange(keys)[None, :] - torch.arange(keys - rows, keys)[:, None]
    return weight[:, their_buckets(relative)].masked_fill(relative > 0, -torch.inf)


def random_bias(heads: int, *, tensor: Group | None = None) -> BucketBias:
    bias = learned_bias(heads, tensor=tensor or ONE_RANK)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(heads))
    return bias


def test_buckets_of_distances_to_5000_equal_transformers() -> None:
    assert torch.equal(buckets(5001, device=CPU), their_buckets(-torch.arange(5001)))


@torch.no_grad()
def test_a_bias_of_one_more_key_makes_no_new_buckets() -> None:
    bias = random_bias(3)
    bias(rows=1, keys=300, device=CPU, dtype=torch.float32)
    before = buckets.cache_info().misses
    for keys in range(301, 513):
        bias(rows=1, keys=keys, device=CPU, dtype=torch.float32)
    assert buckets.cache_info().misses == before


def test_all_buckets_are_used_the_last_before_max_distance() -> None:
    assert buckets(5001, device=CPU).unique().tolist() == list(range(32))
    assert buckets(17, device=CPU).tolist() == list(range(17))
    assert int(buckets(129, device=CPU)[128]) == int(buckets(5001, device=CPU)[5000]) == 31


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 200), (7, 7), (7, 300), (40, 160), (9, 5)])
def test_strip_and_its_gradient_equal_a_table_lookup(rows: int, keys: int) -> None:
    bias = random_bias(3)
    table = bias.weight.detach().clone().requires_grad_()
    strip = bias(rows=rows, keys=keys, device=torch.device("cpu"), dtype=torch.float32)[0]
    expected = looked_up(table, rows=rows, keys=keys)
    assert torch.equal(strip, expected)
    weighting = torch.randn(strip.shape, generator=torch.Generator().manual_seed(0))
    for some in (strip, expected):
        (some * weighting)[some > -torch.inf].sum().backward()
    torch.testing.assert_close(bias.weight.grad, table.grad, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tensor_rank_declares_its_heads_of_one_table(size: int) -> None:
    bias = learned_bias(8, tensor=Group(size - 1, size, None))
    ((parameter, shard),) = declared(bias).values()
    assert (shard.shape, shard.dim, shard.tied) == ((8, T5_BUCKETS), 0, True)
    assert tuple(parameter.shape) == (8 // size, T5_BUCKETS)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("length", [30, 300])  # 300: past the exact buckets, the largest distance and a query block
def test_decoder_equals_the_formula_with_its_table(backend: str, length: int) -> None:
    heads = 3
    decoder = make_decoder(heads, position="t5", backend=backend).double()
    weights = weights_of(decoder)
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    table = looked_up(weights["positions.t5.weight"], rows=length, keys=length)
    logits = decoder(inputs)
    expected = bloom_logits(weights, inputs, layers=LAYERS, heads=heads, penalty=table)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    for some in (logits, expected):
        cross_entropy(some, targets).backward()
    for name, (parameter, _) in declared(decoder).items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=0, msg=name)
    gradient = weights["positions.t5.weight"].grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 1e-4, "the table must matter, or its gradient proves nothing"
