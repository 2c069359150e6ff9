"""Samples hold every token once and no held-out token in training, in the same order for any number of ranks."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from configs.errors import InputError
from configs.step_sizes import StepSize
from data_pipeline.loader import Loader, held_out_parts
from data_pipeline.manifest import Prepared
from data_pipeline.manifest_file import Part
from data_pipeline.order import SampleOrder, held_out_ids
from data_pipeline.samples import Samples, open_samples

LENGTHS = [int(size) for size in np.random.default_rng(3).integers(1, 120, 60)]


def numbered(folder: Path, *lengths: list[int], weights: tuple[float, ...] | None = None) -> Prepared:
    """Data whose tokens are 0, 1, 2 ..., so that a token is its own position."""
    parts = []
    token = 0
    for number, sizes in enumerate(lengths):
        builder = IndexedDatasetBuilder(str(folder / f"part-{number}.bin"), dtype=np.int32)
        for size in sizes:
            builder.add_item(torch.arange(token, token + size))
            builder.end_document()
            token += size
        builder.finalize(str(folder / f"part-{number}.idx"))
        part = Part(f"source{number}", f"part-{number}", False, len(sizes), len(sizes), sum(sizes), 0, 0, None)
        parts.append(replace(part, weight=None if weights is None else weights[number]))
    return Prepared(folder, folder / "no.model", "sha", token, 2, tuple(parts), 0.1, "fingerprint")


def training(
    prepared: Prepared, *, length: int = 16, seed: int = 1, split: float = 0.1, documents: bool = False
) -> Samples:
    return open_samples(prepared, sequence_length=length, split=split, seed=seed, held_out=False, documents=documents)


def held_out(
    prepared: Prepared, *, length: int = 16, seed: int = 1, split: float = 0.1, documents: bool = False
) -> Samples:
    return open_samples(prepared, sequence_length=length, split=split, seed=seed, held_out=True, documents=documents)


def all_tokens(samples: Samples) -> set[int]:
    return set(samples.read(range(len(samples))).ravel().tolist())


@pytest.mark.parametrize("length", [2, 500])
def test_an_epoch_has_every_token_once(tmp_path: Path, length: int) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    samples = training(prepared, length=length, split=0.0)
    rows = samples.read(range(len(samples)))
    assert rows.shape == ((sum(LENGTHS) - 1) // length, length + 1)
    assert rows.dtype == np.int64
    targets = rows[:, 1:].ravel().tolist()
    assert len(set(targets)) == len(targets)
    assert sum(LENGTHS) - len(targets) <= length
    # tokens of a document follow each other, and its end is followed by the beginning of another
    begins = {0, *np.cumsum(LENGTHS).tolist()}
    for row in rows.tolist():
        assert all(after == before + 1 or after in begins for before, after in pairwise(row))


@pytest.mark.parametrize("document", [0, 5, None])
def test_samples_say_where_documents_begin(tmp_path: Path, document: int | None) -> None:
    prepared, firsts = numbered(tmp_path, LENGTHS, LENGTHS[:5]), np.cumsum([0, *LENGTHS, *LENGTHS[:5]]).tolist()
    # The token that ends a document is the last of one, one in the middle of the first, or none at all.
    end = 10**6 if document is None else firsts[document + 1] - 1 if document else 7
    prepared = replace(prepared, end_of_document=end)
    said = 0
    for masked, plain in (
        (training(prepared, documents=True), training(prepared)),
        (held_out(prepared, documents=True), held_out(prepared)),
    ):
        ids = range(len(plain))
        rows = masked.read(ids)
        assert rows.shape == (len(plain), 2, 17)
        assert np.array_equal(rows[:, 0], plain.read(ids))
        assert plain.read(ids).flags.c_contiguous, "or its copy to a GPU waits"
        for tokens, begins in rows.tolist():
            joined = [False, *(b in firsts and a != end for a, b in pairwise(tokens))]
            expected = [at == 0 or tokens[at] == end or joined[at] for at in range(17)]
            assert begins == expected
            said += end in tokens
        assert np.array_equal(masked.read([3, 3])[1], rows[3])
    assert said == (0 if document is None else 1)


def test_held_out_text_is_in_no_training_sample(tmp_path: Path) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    first = held_out(prepared)
    assert np.array_equal(first.read(range(len(first))), held_out(prepared, seed=9).read(range(len(first))))
    kept = set().union(*(all_tokens(held_out(prepared, length=length)) for length in (2, 16, 40)))
    for seed, length in ((1, 2), (1, 16), (9, 16), (9, 40)):
        assert not kept & all_tokens(training(prepared, length=length, seed=seed))
    assert len(kept) + len(all_tokens(training(prepared, length=2))) >= sum(LENGTHS) - 4
    epochs = [training(prepared, seed=seed) for seed in (1, 9)]
    assert len({str(sorted(each.read(range(len(each))).tolist())) for each in epochs}) == 2, "a seed joins its own way"


def test_an_index_is_built_once_for_each_seed_length_and_split(tmp_path: Path) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    first = training(prepared, split=0.1)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "index").rglob("*")}
    again = training(prepared, split=0.1)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "index").rglob("*")} == files
    assert np.array_equal(first.read(range(len(first))), again.read(range(len(first))))
    # megatron-core gives the index of another split the same name
    assert len(training(prepared, split=0.5)) < 0.8 * len(first)
    # a temporary folder would mean an interrupted build
    assert not list((tmp_path / "index").glob(".*"))


def test_an_interrupted_index_is_built_again(tmp_path: Path) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    expected = training(prepared).read([0, 1, 2])
    (folder,) = (tmp_path / "index").iterdir()
    cut = folder.rename(folder.with_name(f".{folder.name}.tmp"))
    for file in cut.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(training(prepared).read([0, 1, 2]), expected)


@pytest.mark.parametrize("size", [0, 50, 130])
def test_a_damaged_index_says_what_to_delete(tmp_path: Path, size: int) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    training(prepared)
    (file,) = tmp_path.glob("index/*/*-shuffle_index.npy")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=rf"the index of samples {file.parent} is damaged \(.*\): delete that folder"):
        training(prepared)


def test_a_node_without_the_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = numbered(tmp_path, LENGTHS)
    with monkeypatch.context() as patch:  # as rank 1, on another node with a copy of the data
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        with pytest.raises(InputError, match="rank 1 does not see the index of samples .*: set data.dir to a folder"):
            training(prepared)
    assert not (tmp_path / "index").exists()


def test_text_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    prepared = numbered(tmp_path, [10, 10])
    with pytest.raises(InputError, match="source0 has 10 training tokens and one sample needs 11: add text or lower"):
        training(prepared, length=10, split=0.5)
    with pytest.raises(InputError, match="source0 has 10 held-out tokens and one sample needs 11: add text, raise"):
        held_out(prepared, length=10, split=0.5)
    assert len(training(prepared, length=9, split=0.5)) == 1
    assert len(training(prepared, length=19, split=0.0)) == 1
    with pytest.raises(InputError, match="source0 has 20 training tokens and one sample needs 21"):
        training(prepared, length=20, split=0.0)


def test_a_blend_has_its_shares_and_a_short_source_is_named(tmp_path: Path) -> None:
    prepared = numbered(tmp_path, LENGTHS, LENGTHS[:30], weights=(1.0, 3.0))
    samples = training(prepared)
    loader = Loader(samples, seed=1, micro_batch=len(samples), data_rank=0, data_size=1)
    (batch,) = loader.step(0, StepSize(len(samples), samples.sequence_length))
    second = (batch[:, 0] >= sum(LENGTHS)).float().mean()
    assert abs(second - 0.75) < 1 / len(samples)
    with pytest.raises(InputError, match="source0 with weight 1e-09 gets none of"):
        training(numbered(tmp_path, LENGTHS, LENGTHS, weights=(1e-9, 1.0)))
    with pytest.raises(InputError, match="source1 has 5 training tokens"):
        training(numbered(tmp_path, LENGTHS, [5], weights=(1.0, 1.0)))
    # without weights it is dropped, like the remainder at the end of a text
    assert training(numbered(tmp_path, LENGTHS, [5])).sizes[1] == 0
    with pytest.raises(InputError, match="every data source"):
        training(numbered(tmp_path, [5], [6]))


def test_an_id_names_a_sample_of_one_source(tmp_path: Path) -> None:
    samples = training(numbered(tmp_path, LENGTHS, LENGTHS[:5], LENGTHS))
    first, second, third = samples.sizes
    begins = samples.read([0, first - 1, first, first + second - 1, first + second, len(samples) - 1])[:, 0]
    ends = np.cumsum([sum(LENGTHS), sum(LENGTHS[:5]), sum(LENGTHS)])
    assert np.searchsorted(ends, begins, side="right").tolist() == [0, 0, 1, 1, 2, 2]
    assert third == first
    with pytest.raises(IndexError):
        samples.read([len(samples)])


def stream_order(ranks: list[list[torch.Tensor]]) -> torch.Tensor:
    """Join the micro-batches of all data ranks as they follow each other in the stream."""
    return torch.cat([batch for one_of_each_rank in zip(*ranks, strict=True) for batch in one_of_each_rank])


def test_a_step_has_the_same_samples_for_any_ranks(tmp_path: Path) -> None:
    samples = training(numbered(tmp_path, LENGTHS))
    order = SampleOrder(seed=5, sizes=samples.sizes, weights=None)
    for micro_batch, data_size in ((3, 1), (4, 2), (1, 8)):
        loaders = [
            Loader(samples, seed=5, micro_batch=micro_batch, data_rank=rank, data_size=data_size)
            for rank in range(data_size)
        ]
        # the last crosses from one epoch to the next
        for consumed in (0, 24, len(samples) - 7):
            batches = [loader.step(consumed, StepSize(24, 16)) for loader in loaders]
            assert {tuple(batch.shape) for rank in batches for batch in rank} == {(micro_batch, 17)}
            assert all(batch.dtype == torch.int64 for rank in batches for batch in rank)
            ids = order.ids(start=consumed, count=24)
            assert np.array_equal(stream_order(batches).numpy(), samples.read(ids))


def held_out_tokens(
    samples: Samples, *, count: int, micro_batch: int, data_size: int, length: int = 16
) -> list[list[int]]:
    """Return the pieces of a validation over all ranks, sorted; one that several ranks take comes once."""
    ids = held_out_ids(samples.sizes, weights=samples.weights, count=count)
    ranks = [
        list(held_out_parts(samples, ids, length=length, micro_batch=micro_batch, data_rank=rank, data_size=data_size))
        for rank in range(data_size)
    ]
    rows = []
    for parts in zip(*ranks, strict=True):
        # what an engine's mean needs: micro-batches of one shape, as many on every rank
        assert len({tuple(batch.shape) for batches, _ in parts for batch in batches}) == 1
        assert len({(len(batches), number) for batches, number in parts}) == 1
        assert all(len(batch) <= micro_batch for batches, _ in parts for batch in batches)
        seen = Counter(tuple(row) for batches, _ in parts for batch in batches for row in batch.tolist())
        assert len(seen) == parts[0][1]
        assert len({*seen.values()}) == 1  # so the mean over the ranks is that of the pieces
        rows += [list(row) for row in seen]
    passes = sum(len(batch) for batches, _ in ranks[0] for batch in batches)
    assert passes <= len(rows) // data_size + data_size.bit_length(), "the ranks share the work"
    return sorted(rows)


@pytest.mark.parametrize("weights", [None, (1.0, 20.0)])
def test_validation_has_the_same_samples_for_any_ranks(tmp_path: Path, weights: tuple[float, ...] | None) -> None:
    samples = held_out(numbered(tmp_path, LENGTHS, LENGTHS, weights=weights))
    layouts = [(1, 1), (2, 2), (4, 2), (3, 4), (2, 8), (64, 1), (1, 64)]
    for count in (1, 7, 8, len(samples) - 1, len(samples), 10 * len(samples)):
        one = held_out_tokens(samples, count=count, micro_batch=1, data_size=1)
        assert len(one) == len({tuple(row) for row in one}) == min(count, len(samples))
        for micro_batch, data_size in layouts:
            assert held_out_tokens(samples, count=count, micro_batch=micro_batch, data_size=data_size) == one
            for length in (4, 1):  # of the same tokens
                pieces = held_out_tokens(
                    samples, count=count, micro_batch=micro_batch, data_size=data_size, length=length
                )
                assert pieces == sorted(row[n : n + length + 1] for row in one for n in range(0, 16, length))
