"""KERPLE's and Sandwich's biases against their formulas in fp64, with gradients and split over tensor ranks."""

import pytest
import torch
from torch import Tensor

from configs.errors import InputError
from configs.load import load_run
from configs.schema import Model
from parallel.axes import Group
from parallel.seeds import initial_weights
from parallel.shards import declared
from tests.support.models import ONE_RANK
from training.families.table import shards_of
from training.model.positions.by_distance import LearnedBias
from training.model.positions.method import PositionMethod, make_position
from training.model.positions.sandwich import SandwichBias

CPU = torch.device("cpu")
HEADS = 6
SHAPES = [(1, 1), (1, 200), (7, 7), (40, 300), (9, 5)]


def method_of(position: str, *, tensor: Group = ONE_RANK) -> PositionMethod:
    model = Model(layers=1, hidden=HEADS, heads=HEADS, position=position)
    method = make_position(model, shards_of(model, vocab_size=1), tensor=tensor)
    if method.module is not None:
        initial_weights(method.module, seed=1, tensor=tensor)
    return method


def strip_of(method: PositionMethod, *, rows: int, keys: int) -> Tensor:
    return method.bias(rows=rows, keys=keys, device=CPU, dtype=torch.float64)[0]


def distances(rows: int, keys: int) -> Tensor:
    return torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_kerple_and_its_gradient_are_its_formulas(rows: int, keys: int) -> None:
    method = method_of("kerple")
    assert isinstance(method.bias, LearnedBias)
    table = method.bias.weight.detach().double().requires_grad_()
    r1, r2 = table.exp()[:, :, None, None].unbind(1)
    ahead = distances(rows, keys) < 0
    expected = -r1 * torch.log(1 + r2 * distances(rows, keys).clamp(min=0))
    strip = strip_of(method, rows=rows, keys=keys)
    torch.testing.assert_close(strip, expected.masked_fill(ahead, -torch.inf), atol=1e-12, rtol=0)
    weighting = torch.randn(strip.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (strip * weighting)[:, ~ahead].sum().backward()
    (expected * weighting)[:, ~ahead].sum().backward()
    torch.testing.assert_close(method.bias.weight.grad.double(), table.grad, atol=1e-4, rtol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_sandwich_is_products_of_position_vectors(rows: int, keys: int) -> None:
    pair = torch.arange(64, dtype=torch.float64)
    angles = torch.arange(max(rows, keys))[:, None] / 10000 ** (2 * pair / 128)
    vectors = torch.cat([angles.sin(), angles.cos()], dim=1)
    products = vectors @ vectors.T  # [positions, positions]
    compressions = torch.arange(1, HEADS + 1, dtype=torch.float64) * 8 / HEADS
    expected = (products - 64) / compressions[:, None, None]
    strip = strip_of(method_of("sandwich"), rows=rows, keys=keys)
    seen = min(rows, keys)
    torch.testing.assert_close(
        strip[:, -seen:].masked_fill(distances(seen, keys) < 0, 0.0),
        expected[:, keys - seen : keys, :keys].masked_fill(distances(seen, keys) < 0, 0.0),
        atol=1e-11,
        rtol=0,
    )
    assert bool((strip[:, distances(rows, keys) < 0] == -torch.inf).all())


def test_sandwich_is_computed_and_sent_to_a_device_once() -> None:
    bias = method_of("sandwich").bias
    assert isinstance(bias, SandwichBias)
    longest = bias.by_distance(300, device=CPU, dtype=torch.float32)
    again = bias.by_distance(7, device=CPU, dtype=torch.float32)  # as another layer asks for it
    assert again.data_ptr() == longest.data_ptr()
    torch.testing.assert_close(again, longest[:, :7], atol=0, rtol=0)
    wide = bias.by_distance(300, device=CPU, dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), longest, atol=0, rtol=0)
    assert bias.by_distance(900, device=CPU, dtype=torch.float64).shape == (HEADS, 900)


@pytest.mark.parametrize("position", ["kerple", "sandwich"])
def test_ranks_hold_the_biases_of_their_heads(position: str) -> None:
    whole = method_of(position)
    strip = strip_of(whole, rows=4, keys=70)
    for size in (2, 3):
        parts = [method_of(position, tensor=Group(rank, size, None)) for rank in range(size)]
        joined = torch.cat([strip_of(part, rows=4, keys=70) for part in parts])
        assert torch.equal(joined, strip)
        promised = torch.cat([part.penalty(70) for part in parts])
        torch.testing.assert_close(promised, whole.penalty(70), atol=0, rtol=0)
    torch.testing.assert_close(whole.penalty(70).flip(1), strip[:, -1], atol=1e-11, rtol=0)


def test_kerples_table_is_two_numbers_a_head_that_differ() -> None:
    bias = method_of("kerple").module
    assert bias is not None
    ((parameter, shard),) = declared(bias).values()
    assert (shard.name, shard.shape, shard.dim, shard.tied) == ("positions.kerple.weight", (HEADS, 2), 0, True)
    assert not shard.decays
    assert parameter.unique().numel() == 2 * HEADS
    assert 0.2 < float(parameter.detach().std()) < 0.9


def test_kernels_that_take_no_table_refuse_them() -> None:
    for position in ("kerple", "sandwich"):
        message = f"flex cannot compute model.position {position}: use reference or sdpa"
        with pytest.raises(InputError, match=message):
            load_run("demo", overrides=[f"model.position={position}", "model.attention=flex"])
