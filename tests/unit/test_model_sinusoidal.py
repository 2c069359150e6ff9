"""Sinusoidal positions against their formula: the table, and the whole decoder that adds it."""

import math

import pytest
import torch

from parallel.shards import declared
from tests.support.bloom_formula import bloom_logits, cross_entropy
from tests.support.models import LAYERS, VOCABULARY, make_decoder, weights_of
from training.model.positions.sinusoidal import sinusoids


def formula(seq: int, hidden: int) -> torch.Tensor:
    """All sines, then all cosines, position by position, [seq, hidden] fp64."""
    half = hidden // 2
    rows = [
        [wave(place / 10000 ** (i / (half - 1))) for wave in (math.sin, math.cos) for i in range(half)]
        for place in range(seq)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("seq", "hidden"), [(7, 6), (300, 24)])
def test_sinusoids_equal_the_formula_to_rounding(seq: int, hidden: int) -> None:
    table = sinusoids(seq, hidden=hidden, device=torch.device("cpu"))
    torch.testing.assert_close(table, formula(seq, hidden).float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("length", [30, 300])  # 300: past a query block
def test_decoder_equals_the_formula_in_logits_and_gradients(backend: str, length: int) -> None:
    heads = 3
    decoder = make_decoder(heads, position="sinusoidal", backend=backend).double()
    weights = weights_of(decoder)
    hidden = weights["embedding.word.weight"].shape[1]
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    table = formula(length, hidden).float().double()  # kept in fp32
    logits = decoder(inputs)
    none = torch.zeros(heads, length, length, dtype=torch.float64)
    expected = bloom_logits(
        weights, inputs, layers=LAYERS, heads=heads, penalty=none, embedded=lambda x: x * math.sqrt(hidden) + table
    )
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    for some in (logits, expected):
        cross_entropy(some, targets).backward()
    for name, (parameter, _) in declared(decoder).items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=0, msg=name)
