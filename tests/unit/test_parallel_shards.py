"""Slices of a tensor in any layout, and stage bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.axes import Group
from parallel.layout import padded_vocabulary, stage_bounds
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


@given(blocks=st.integers(1, 100), stages=st.integers(1, 12))
def test_stages_share_blocks_and_the_first_take_the_odd_ones(blocks: int, stages: int) -> None:
    bounds = stage_bounds(blocks, stages=stages)
    sizes = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    assert sum(sizes) == blocks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_the_reference_job_has_13_and_12_blocks() -> None:
    assert stage_bounds(25, stages=2) == (0, 13, 25)
