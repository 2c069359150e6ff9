"""The order of samples and the split are functions of their arguments alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.order import SampleOrder, shares
from data_pipeline.split import held_out_count, held_out_sequences, shuffled, training_sequences

seeds = st.integers(0, 2**63)


def ids_of(
    *, seed: int, sizes: tuple[int, ...], weights: tuple[float, ...] | None, start: int, count: int
) -> NDArray[np.int64]:
    """Return ids from an order with empty caches."""
    return SampleOrder(seed=seed, sizes=sizes, weights=weights).ids(start=start, count=count)


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@st.composite
def weighted(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[float, ...]]:
    drawn = draw(sizes)
    weights = st.lists(st.floats(0.01, 100), min_size=len(drawn), max_size=len(drawn))
    return drawn, tuple(draw(weights))


@given(seeds, sizes, st.integers(0, 5))
def test_without_weights_every_id_comes_once_an_epoch(seed: int, sizes: tuple[int, ...], epoch: int) -> None:
    total = sum(sizes)
    ids = ids_of(seed=seed, sizes=sizes, weights=None, start=epoch * total, count=total)
    assert sorted(ids) == list(range(total))


@given(seeds, weighted(), st.integers(0, 5))
def test_with_weights_every_epoch_has_the_same_shares(seed: int, blend: tuple, epoch: int) -> None:
    sizes, weights = blend
    total = sum(sizes)
    ids = ids_of(seed=seed, sizes=sizes, weights=weights, start=epoch * total, count=total)
    counts = np.bincount(np.searchsorted(np.cumsum(sizes), ids, side="right"), minlength=len(sizes))
    assert tuple(counts) == shares(weights, total=total)


@given(weighted(), st.integers(1, 10_000))
def test_shares_are_within_one_of_the_exact_ones(blend: tuple, total: int) -> None:
    _, weights = blend
    given_shares = shares(weights, total=total)
    assert sum(given_shares) == total
    for share, weight in zip(given_shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * total) < 1


@given(seeds, weighted())
def test_with_weights_a_source_is_used_up_before_it_repeats(seed: int, blend: tuple) -> None:
    sizes, weights = blend
    ids = ids_of(seed=seed, sizes=sizes, weights=weights, start=0, count=4 * sum(sizes))
    begin = 0
    for size in sizes:
        own = ids[(ids >= begin) & (ids < begin + size)] - begin
        for start in range(0, len(own), size):
            turn = own[start : start + size]
            assert len(set(turn)) == len(turn)
        begin += size


@settings(max_examples=50)
@given(seeds, weighted(), st.booleans(), st.lists(st.integers(0, 60), max_size=6))
def test_cuts_of_the_stream_join_to_the_stream(seed: int, blend: tuple, use_weights: bool, cuts: list[int]) -> None:
    sizes, weights = blend
    order = SampleOrder(seed=seed, sizes=sizes, weights=weights if use_weights else None)
    whole = order.ids(start=0, count=sum(cuts))
    start, joined = 0, []
    for count in cuts:
        joined.extend(ids_of(seed=seed, sizes=sizes, weights=order.shares and weights, start=start, count=count))
        start += count
    assert joined == whole.tolist()


def test_another_seed_or_epoch_is_another_order() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return ids_of(seed=seed, sizes=(1000,), weights=None, start=1000 * number, count=1000).tolist()

    assert epoch(1, 0) != epoch(2, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) == epoch(1, 0)


def test_the_order_is_the_one_that_earlier_versions_used() -> None:
    # a run that is resumed after an update must continue in the same order
    assert shuffled(8, seed=(1, 2, 3)).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert ids_of(seed=7, sizes=(5, 3), weights=None, start=4, count=8).tolist() == [4, 5, 0, 6, 2, 6, 7, 4]
    assert ids_of(seed=7, sizes=(5, 3), weights=(1.0, 2.0), start=4, count=8).tolist() == [6, 4, 7, 3, 1, 0, 5, 5]
    assert held_out_sequences(100, share=0.05).tolist() == [1, 13, 14, 18, 98]


@given(st.integers(2, 3000), st.floats(0.0001, 0.99))
def test_held_out_and_training_sequences_are_all_and_apart(count: int, share: float) -> None:
    held_out, training = held_out_sequences(count, share=share), training_sequences(count, share=share)
    assert len(held_out) == held_out_count(count, share=share)
    assert len(held_out) >= 1
    assert len(training) >= 1
    assert sorted([*held_out, *training]) == list(range(count))
    assert held_out.tolist() == sorted(shuffled(count, seed=(20211008,))[: len(held_out)].tolist())
    assert abs(len(held_out) - count * share) <= 1


def test_nothing_is_held_out_at_share_zero_or_of_one_sequence() -> None:
    assert held_out_count(100, share=0.0) == 0
    assert held_out_count(1, share=0.5) == 0
    assert training_sequences(3, share=0.0).tolist() == [0, 1, 2]


@given(seeds, weighted(), st.booleans(), st.integers(1, 200))
def test_distinct_ids_are_the_streams_without_repeats(seed: int, blend: tuple, even: bool, count: int) -> None:
    sizes, weights = blend
    order = SampleOrder(seed=seed, sizes=sizes, weights=None if even else weights)
    ids = order.distinct_ids(count).tolist()
    assert len(ids) == len(set(ids)) == min(count, sum(sizes))
    stream = list(dict.fromkeys(order.ids(start=0, count=sum(sizes)).tolist()))
    assert ids[: len(stream)] == stream[:count]
