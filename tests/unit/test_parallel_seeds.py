"""Initial weights: drawn by name and place, the same in every layout; a rank draws only what it holds."""

from functools import partial
from math import erf, prod
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.axes import Group
from parallel.parameter import Rule, Shard
from parallel.seeds import draw_on_gpu, initial_range, initial_slice, seed_for
from parallel.shards import cut

WHOLE = Group(0, 1, None)
RULES: tuple[Rule, ...] = ("replicated", "column", "row", "vocabulary")


def weight(shape: tuple[int, ...], rule: Rule = "column", *, name: str = "linear.weight") -> Shard:
    return Shard(name, shape, rule, init_std=0.02)


def whole(shard: Shard, *, seed: int = 1) -> torch.Tensor:
    return initial_slice(shard, seed=seed, tensor=WHOLE)


def test_seeds_differ_by_purpose_and_never_change() -> None:
    assert seed_for(1, "weights", "a") != seed_for(1, "weights", "b") != seed_for(2, "weights", "a")
    assert seed_for(1, "weights", "final_norm.weight") == 6229764837226836576


def test_initial_weights_never_change() -> None:
    # Held values: Philox's bits and the quantiles are the same everywhere. New ones would change every run's losses.
    column = [0.000901822641, -0.0279310867, -0.00599210523, 0.0173324328, 0.016951384, -0.0123517932]
    row = [-0.0160514712, 0.0181025676, -0.0224879626, -0.0080322288, -0.00512697129, 0.0229679793]
    assert whole(weight((3, 2))).flatten().tolist() == pytest.approx(column, rel=1e-6)
    assert whole(weight((2, 3), "row"), seed=2).flatten().tolist() == pytest.approx(row, rel=1e-6)
    # far into the stream, where the counter has more than one digit
    far = initial_range(weight((50_000, 3_000)), seed=1, tensor=WHOLE, start=149_999_998, stop=150_000_001)
    assert far.tolist() == pytest.approx([-0.0425082333, 0.0110285468, 0.0], rel=1e-6)


@settings(deadline=None)
@given(
    rule=st.sampled_from(RULES),
    ranks=st.integers(1, 5),
    part=st.integers(1, 40),
    other=st.integers(1, 70),
    data=st.data(),
)
def test_any_part_has_the_values_of_the_whole(
    rule: Rule, ranks: int, part: int, other: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, part * ranks)) if rule == "vocabulary" else part * ranks
    shard = weight((other, length) if rule == "row" else (length, other), rule)
    drawn_whole = whole(shard)
    for rank in range(ranks):
        tensor = Group(rank, ranks, None)
        expected = cut(drawn_whole, shard=shard, tensor=tensor)
        assert torch.equal(initial_slice(shard, seed=1, tensor=tensor), expected)
        start = data.draw(st.integers(0, expected.numel()))
        stop = data.draw(st.integers(start, expected.numel() + 100))
        padded = torch.cat([expected.flatten(), torch.zeros(100)])
        drawn = initial_range(shard, seed=1, tensor=tensor, start=start, stop=stop)
        assert drawn.dtype == torch.float32
        assert torch.equal(drawn, padded[start:stop])
        # a GPU's operations, which any device has
        with patch("parallel.seeds.draw_on_cpu", partial(draw_on_gpu, chunk=other)):
            drawn = initial_range(shard, seed=1, tensor=tensor, start=start, stop=stop)
        assert torch.equal(drawn, padded[start:stop])


def test_a_gpu_draws_the_same_bits_far_into_the_stream() -> None:
    for key, row in [(2**63 - 1, 2**32 - 3), (0, 0), (2**62 + 12345, 2**40 + 7)]:
        numbers = [(row + each) * 3 + column for each in range(40) for column in range(3)]
        generator = np.random.Philox(key=key)
        generator.advance(numbers[0] // 16)
        words = generator.random_raw(4 * 16).astype("<u8").view("<u2")[numbers[0] % 16 :][: len(numbers)]
        shard, held = Shard("linear.weight", (row + 40, 3), "column", init_std=1.0), torch.empty(40, 3)
        draw_on_gpu(held, shard, key=key, row=row, column=0)
        assert held.flatten().argsort(stable=True).tolist() == words.astype(int).argsort(kind="stable").tolist()


def test_constants_are_cut_like_weights() -> None:
    ones = Shard("norm.weight", (10,), "vocabulary", constant=1.0)
    parts = [initial_slice(ones, seed=1, tensor=Group(rank, 4, None)).tolist() for rank in range(4)]
    assert parts == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert initial_range(ones, seed=1, tensor=WHOLE, start=8, stop=12).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_changes_no_value(rule: Rule) -> None:
    shard, threads = weight((700, 1000), rule), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = whole(shard)
        torch.set_num_threads(5)
        assert torch.equal(whole(shard), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_draws_only_what_it_holds(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    class Counted(np.random.Philox):
        def random_raw(self, size: int, output: bool = True) -> object:  # type: ignore[override]
            drawn.append(4 * size)
            return super().random_raw(size, output)

    monkeypatch.setattr(np.random, "Philox", Counted)
    shard, tensor = weight((640, 1280), rule), Group(3, 4, None)
    held = prod(shard.shape) // (1 if rule == "replicated" else 4)
    assert initial_slice(shard, seed=1, tensor=tensor).numel() == held
    assert held <= sum(drawn) <= 1.02 * held
    drawn.clear()
    # ZeRO-3: one of 8 data ranks; it draws the rows that hold its part
    initial_range(shard, seed=1, tensor=tensor, start=5 * held // 8, stop=6 * held // 8)
    assert held / 8 <= sum(drawn) <= 1.05 * held / 8


def test_initial_weights_are_normal() -> None:
    drawn = whole(weight((2000, 1500))).double().flatten() / 0.02
    count = drawn.numel()
    assert float(drawn.mean()) == pytest.approx(0, abs=4 / count**0.5)
    assert float(drawn.std()) == pytest.approx(1, abs=4 / (2 * count) ** 0.5)
    assert float((drawn**3).mean()) == pytest.approx(0, abs=4 * (15 / count) ** 0.5)
    assert float((drawn**4).mean()) == pytest.approx(3, abs=4 * (96 / count) ** 0.5)
    # Kolmogorov and Smirnov's distance from the normal distribution, at 0.1 %
    expected = (1 + torch.erf(drawn.sort().values / 2**0.5)) / 2
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    assert distance < 1.95 / count**0.5
    assert (1 + erf(4 / 2**0.5)) / 2 < float(expected.max()) < 1


@pytest.mark.parametrize("rule", ["column", "row"])
def test_rows_columns_names_and_seeds_are_uncorrelated(rule: Rule) -> None:
    shard = weight((512, 2048), rule)
    first = whole(shard)
    others = [whole(weight((512, 2048), rule, name="other.weight")), whole(shard, seed=2)]
    # neighbours in a row, in a column, across panels and counters
    pairs = [(first[:, :-n], first[:, n:]) for n in (1, 4, 16, 32, 1024)]
    pairs += [(first[:-n], first[n:]) for n in (1, 2, 64)]
    for a, b in [*pairs, *((first, other) for other in others)]:
        assert float((a * b).mean()) / 0.02**2 == pytest.approx(0, abs=4 / a.numel() ** 0.5)
    assert torch.linalg.matrix_rank(first) == 512
