"""Slices of a tensor in any layout, and stage bounds."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.schema import Model
from parallel.axes import Group
from parallel.layout import head_blocks, padded_vocabulary, stage_bounds
from parallel.parameter import Rule, Shard
from parallel.shards import cut


@given(rows=st.integers(1, 40), ranks=st.integers(1, 9))
def test_vocabulary_slices_join_to_the_whole_and_zeros(rows: int, ranks: int) -> None:
    whole = torch.arange(1.0, 2 * rows + 1).view(rows, 2)
    shard = Shard("embedding", (rows, 2), "vocabulary")
    parts = [cut(whole, shard=shard, tensor=Group(rank, ranks, None)) for rank in range(ranks)]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts)
    assert joined.shape[0] == padded_vocabulary(rows, tensor=ranks)
    assert torch.equal(joined[:rows], whole)
    assert not joined[rows:].any()


@pytest.mark.parametrize(("rule", "dim"), [("column", 0), ("row", 1)])
def test_columns_and_rows_are_cut_along_their_dimension(rule: Rule, dim: int) -> None:
    whole = torch.arange(24.0).view(4, 6)
    shard = Shard("linear", (4, 6), rule)
    parts = [cut(whole, shard=shard, tensor=Group(rank, 2, None)) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=dim), whole)


def test_a_column_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(AssertionError, match="does not divide"):
        cut(torch.zeros(5, 2), shard=Shard("linear", (5, 2), "column"), tensor=Group(1, 2, None))


@given(blocks=st.integers(1, 9), stages=st.integers(1, 5), quarters=st.integers(0, 48))
def test_no_split_has_a_smaller_largest_stage(blocks: int, stages: int, quarters: int) -> None:
    assume(stages <= blocks)
    head = quarters / 4
    bounds = stage_bounds(blocks, stages=stages, head=head)
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, blocks, stages)
    assert min(sizes) >= 1
    cuts = ((0, *inner, blocks) for inner in combinations(range(1, blocks), stages - 1))
    others = [[stop - start for start, stop in pairwise(cut)] for cut in cuts]
    assert max(*sizes, sizes[-1] + head) == min(max(*other, other[-1] + head) for other in others)
    assert sizes[:-1] == sorted(sizes[:-1]), "the first stages hold activations of more micro-batches"


def test_the_reference_head_is_worth_two_blocks() -> None:
    model = Model(layers=25, hidden=2048, heads=16)
    head = head_blocks(model, vocab_size=50304, length=1024)
    assert head == pytest.approx(50304 / (12 * 2048 + 1024))
    assert head == pytest.approx(2, abs=0.05)
    assert stage_bounds(25, stages=2, head=head) == (0, 13, 25)
    assert stage_bounds(25, stages=4, head=head) == (0, 6, 13, 20, 25)
