"""Prepared data equals the text, is complete or absent, is prepared once, and only from the run file's inputs."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from configs.errors import InputError, MachineError
from configs.files import one_writer
from configs.schema import Data
from data_pipeline.indexed import histogram, iter_sequences, smallest_dtype, write_index
from data_pipeline.manifest import Prepared, load_prepared
from data_pipeline.prepare import prepare_data
from data_pipeline.samples import open_samples
from data_pipeline.tokenizer import load_tokenizer
from tests.support.data import BOOK, small_data, write_book


def prepared_from(data: Data, folder: Path) -> Prepared:
    return prepare_data(data, folder=folder, progress=False)


def refused(data: Data, folder: Path, *, by=prepared_from) -> str:
    with pytest.raises(InputError) as caught:
        by(data, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(data: Data, folder: Path) -> Prepared:
    return load_prepared(data, folder=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    """A prepared book; tests change only copies of it."""
    folder = tmp_path_factory.mktemp("whole")
    data = small_data(write_book(folder))
    prepared_from(data, folder / "data")
    return data, folder / "data"


@pytest.fixture
def copy(whole: tuple[Data, Path], tmp_path: Path) -> tuple[Data, Path]:
    shutil.copytree(whole[1], tmp_path / "data")
    return whole[0], tmp_path / "data"


def test_megatron_reads_the_text_back(whole: tuple[Data, Path]) -> None:
    data, folder = whole
    prepared = load(data, folder)
    assert (prepared.vocab_size, prepared.end_of_document, len(prepared.parts)) == (600, 2, 1)
    (part,) = prepared.parts
    dataset = IndexedDataset(str(prepared.prefix(part)))
    sequences = [dataset[i] for i in range(len(dataset))]
    assert dataset.index.dtype is np.uint16
    assert len(sequences) == part.sequences >= 10
    assert dataset.document_indices.tolist() == [0, part.sequences]
    assert [int(tokens[-1]) == 2 for tokens in sequences] == [False] * (part.sequences - 1) + [True]
    tokens = np.concatenate(sequences)
    assert load_tokenizer(prepared.tokenizer).decode(tokens) == BOOK
    assert (prepared.tokens, part.words) == (len(tokens), len(BOOK.split()))
    assert np.array_equal(np.load(folder / "unigram.npy"), np.bincount(tokens, minlength=600))
    assert not [file.name for file in folder.iterdir() if file.name.endswith((".tmp", "preparing.json"))]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_index_is_the_one_that_megatron_writes(tmp_path: Path, dtype: type) -> None:
    data = megatron_data(tmp_path / "theirs", [[1, 2, 3], [], [4]], dtype=dtype)
    write_index(tmp_path / "ours.idx", dtype=np.dtype(dtype), lengths=[3, 0, 1], document_ends=[1, 2, 3])
    assert (tmp_path / "ours.idx").read_bytes() == data.with_suffix(".idx").read_bytes()
    for vocab_size in (300, 65_499, 65_500, 250_880):
        assert smallest_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_sources_without_weights_share_a_part_and_documents_end(tmp_path: Path) -> None:
    records = tmp_path / "more.jsonl.gz"
    records.write_bytes(gzip.compress(b"".join(json.dumps({"text": BOOK[i::3]}).encode() + b"\n" for i in range(3))))
    text = write_book(tmp_path, text=f"{BOOK}<|end|>tail")
    data = small_data(text, records, document_separator="<|end|>")
    (part,) = prepared_from(data, tmp_path / "data").parts
    assert part.documents == 5
    dataset = IndexedDataset(str(tmp_path / "data" / part.prefix))
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.model")
    documents = [np.concatenate(dataset[a:b]) for a, b in pairwise(dataset.document_indices)]
    assert [tokenizer.decode(tokens) for tokens in documents] == [BOOK, "tail", BOOK[0::3], BOOK[1::3], BOOK[2::3]]
    assert all((tokens == 2).nonzero()[0].tolist() == [len(tokens) - 1] for tokens in documents)


def test_done_work_is_not_done_again_and_needs_no_torch(copy: tuple[Data, Path]) -> None:
    data, folder = copy
    states = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != ".lock"}
    command = (
        "import sys; from pathlib import Path; from configs.schema import Data\n"
        "from data_pipeline.prepare import prepare_data\n"
        "prepare_data(Data.model_validate_json(sys.argv[1]), folder=Path(sys.argv[2]), progress=False)\n"
        "print([name for name in ('torch', 'megatron', 'pyarrow') if name in sys.modules])"
    )
    started_at = time.monotonic()
    arguments = [sys.executable, "-c", command, data.model_dump_json(), str(folder)]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout == "[]\n"
    assert time.monotonic() - started_at < 5
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != ".lock"} == states


def test_prepared_data_needs_no_right_to_write(copy: tuple[Data, Path]) -> None:
    data, folder = copy
    (folder / ".lock").unlink()
    before = folder.stat().st_mtime_ns
    assert prepared_from(data, folder).documents == 1
    assert folder.stat().st_mtime_ns == before


def test_other_inputs_than_those_of_the_folder_are_named(copy: tuple[Data, Path], tmp_path: Path) -> None:
    data, folder = copy
    path = data.sources[0].path
    other = tmp_path / "other.txt"
    shutil.copy(path, other)
    for values, message in (
        ({"vocab_size": 700}, "data.vocab_size was 600 then and is 700 now"),
        ({"document_separator": "\n\n"}, 'data.document_separator was null then and is "\\n\\n" now'),
    ):
        assert message in refused(small_data(path, **values), folder)
        assert message in refused(small_data(path, **values), folder, by=load)
    assert "data.sources was" in refused(small_data(other), folder)
    assert "set data.dir to another folder, or delete" in refused(small_data(other), folder, by=load)
    assert "had no weights then" in refused(small_data((path, 1.0)), folder)


def test_a_source_that_changed_is_named(tmp_path: Path) -> None:
    book = write_book(tmp_path)
    data = small_data(book)
    prepared_from(data, tmp_path / "data")
    later = book.stat().st_mtime_ns + 10**9
    os.utime(book, ns=(later, later))
    assert f"{book} changed (modified since)" in refused(data, tmp_path / "data")
    book.write_text("shorter")
    assert f"{book} changed ({len(BOOK.encode())} bytes then, 7 now)" in refused(data, tmp_path / "data")
    # prepared data can be used without its source
    book.unlink()
    assert load(data, tmp_path / "data").tokens > 1000


def test_data_that_is_not_prepared_says_so(whole: tuple[Data, Path], tmp_path: Path) -> None:
    data, _ = whole
    assert "data is not prepared in" in refused(data, tmp_path / "nothing", by=load)
    (tmp_path / "file").write_text("x")
    assert "run `trainshort prepare`" in refused(data, tmp_path / "file", by=load)
    assert "is a file: set data.dir to a folder" in refused(data, tmp_path / "file")
    assert "is a file" in refused(data, tmp_path / "file" / "below")


def test_truncated_and_missing_files_are_refused(copy: tuple[Data, Path]) -> None:
    data, folder = copy
    for name in ("part-000.bin", "part-000.idx"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2])
        for by in (load, prepared_from):
            assert f"{name} has {len(content) - 2} bytes, {len(content)} were written" in refused(data, folder, by=by)
        (folder / name).unlink()
        assert f"{name} is missing" in refused(data, folder, by=load)
        (folder / name).write_bytes(content)


def test_a_changed_tokenizer_or_manifest_is_refused(copy: tuple[Data, Path]) -> None:
    data, folder = copy
    (folder / "tokenizer.model").write_bytes(b"x")
    assert "is not the one that the data was prepared with" in refused(data, folder, by=load)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 99'))
    assert "has format_version 99, this version reads 1" in refused(data, folder, by=load)
    (folder / "manifest.json").write_text(manifest[:50])
    assert "cannot be read" in refused(data, folder, by=load)


def test_a_manifest_with_wrong_values_is_refused(copy: tuple[Data, Path]) -> None:
    data, folder = copy
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for changes, what in (
        ({"inputs": None}, "inputs: Input should be a valid dictionary"),
        ({"inputs": {**manifest["inputs"], "data.sources": 3}}, "data.sources: Input should be a valid list"),
        ({"inputs": {**manifest["inputs"], "files": {"a": [3]}}}, "files.a.0: Input should be a valid tuple"),
        ({"parts": []}, "parts: Tuple should have at least 1 item"),
        ({"parts": [{**manifest["parts"][0], "sequences": "x"}]}, "parts.0.sequences: Input should be a valid integer"),
        ({"vocab_size": []}, "vocab_size: Input should be a valid integer"),
        ({"files_sha256": 3}, "files_sha256: Input should be a valid tuple"),
    ):
        file.write_text(json.dumps({**manifest, **changes}))
        assert f"{file} is damaged ({what}" in refused(data, folder, by=load)
        assert f"{file} is damaged ({what}" in refused(data, folder)
    for key in set(manifest) - {"format_version", "files_sha256"}:  # an older version wrote no hashes
        file.write_text(json.dumps({other: value for other, value in manifest.items() if other != key}))
        assert f"{file} is damaged (no {key}): set data.dir to another folder" in refused(data, folder, by=load)


def test_an_interrupted_prepare_does_not_count_as_prepared(tmp_path: Path) -> None:
    first, second = write_book(tmp_path, "first.txt"), tmp_path / "second.txt"
    second.write_bytes(BOOK.encode() * 2 + b"\xff")
    tokenizer = train(tmp_path)
    data = small_data((first, 1.0), (second, 3.0), tokenizer=str(tokenizer))
    assert "is not UTF-8" in refused(data, tmp_path / "data")
    assert sorted(file.name for file in (tmp_path / "data").glob("[!.]*")) == [
        "part-000.bin",
        "part-000.idx",
        "part-000.json",
        "part-000.words.npy",
        "preparing.json",
        "tokenizer.model",
    ]
    assert "is not prepared" in refused(data, tmp_path / "data", by=load)
    # the fixed file is another input, so everything is prepared again; with the same inputs the first part is kept
    second.write_text(BOOK * 2)
    (tmp_path / "data" / ".part-002.bin.tmp").write_bytes(b"a third part that was begun before a kill")
    prepared = prepared_from(data, tmp_path / "data")
    assert [part.weight for part in prepared.parts] == [1.0, 3.0]
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_a_finished_part_is_kept(tmp_path: Path) -> None:
    book = write_book(tmp_path)
    data = small_data((book, 1.0))
    folder = tmp_path / "data"
    prepared_from(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = folder / "part-000.bin"
    written_at, content = tokens.stat().st_mtime_ns, tokens.read_bytes()
    for kept in (True, False):
        # as if killed just before the manifest was written
        (folder / "manifest.json").unlink()
        (folder / "preparing.json").write_text(json.dumps(manifest["inputs"]))
        (folder / "part-000.json").write_text(json.dumps(manifest["parts"][0]))
        if not kept:  # by a disk
            tokens.write_bytes(content[:-2])
        prepared_from(data, folder)
        assert tokens.read_bytes() == content
        assert (tokens.stat().st_mtime_ns == written_at) is kept


def test_files_that_prepare_did_not_write_are_left_alone(tmp_path: Path) -> None:
    data = small_data(write_book(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-000.bin").write_bytes(b"mine")
    assert "set data.dir to an empty folder" in refused(data, tmp_path / "data")
    assert (tmp_path / "data" / "part-000.bin").read_bytes() == b"mine"


def test_sources_in_an_unfinished_folder_are_not_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "preparing.json").write_text("{}")  # as if killed while it prepared other inputs
    mine = write_book(folder, "part-7.txt")
    model = shutil.copy(train(tmp_path), folder / "tokenizer.model")
    other = write_book(tmp_path)
    for data, file in ((small_data(mine), mine), (small_data(other, tokenizer=str(folder)), model)):
        assert f"the data would be prepared from {file}, but {folder} holds" in refused(data, folder)
    assert mine.read_text() == BOOK
    assert prepared_from(small_data(other), folder).documents == 1


def test_two_prepares_at_once_wait_for_each_other(tmp_path: Path) -> None:
    data, folder = small_data(write_book(tmp_path)), tmp_path / "data"
    folder.mkdir()
    done: list[Prepared] = []
    with one_writer(folder, on_wait=lambda: None):
        other = threading.Thread(target=lambda: done.append(prepared_from(data, folder)))
        other.start()
        other.join(timeout=0.5)
        assert not done
    other.join(timeout=60)
    assert done


def test_first_uses_at_the_same_moment_lose_none(tmp_path: Path) -> None:
    data = small_data(write_book(tmp_path))
    together = threading.Barrier(6)

    def start(_: int) -> list[list[int]]:
        together.wait()
        prepared = prepared_from(data, tmp_path / "new" / "data")
        together.wait()
        samples = open_samples(prepared, sequence_length=16, split=0.1, seed=1, held_out=False)
        return samples.read([0, 5, len(samples) - 1]).tolist()

    with ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(start, range(6))
    assert others == [first] * 5
    assert not [path for path in (tmp_path / "new" / "data").rglob("*") if path.name.endswith(".tmp")]


def test_a_folder_that_cannot_be_written_is_a_machine_error(tmp_path: Path) -> None:
    data = small_data(write_book(tmp_path))
    with pytest.raises(MachineError, match="set data.dir to another"):
        prepared_from(data, Path("/proc/nothing/data"))


def test_a_single_chunk_cannot_be_held_out_from(tmp_path: Path) -> None:
    data = small_data(write_book(tmp_path, text=BOOK[:9000]), vocab_size=400)
    message = refused(data, tmp_path / "data")
    assert "is a single chunk of" in message
    assert "add text, set data.document_separator, or set data.split to 0" in message
    # the next call uses the files written before
    assert prepared_from(data.model_copy(update={"split": 0.0}), tmp_path / "data").parts[0].sequences == 1
    assert "is a single chunk of" in refused(data, tmp_path / "data", by=load)


def test_a_source_named_twice_is_refused(tmp_path: Path) -> None:
    book = write_book(tmp_path)
    assert "2 times: name it once" in refused(small_data(book, book), tmp_path / "data")


def train(folder: Path) -> Path:
    prepared_from(small_data(write_book(folder, "for-tokenizer.txt")), folder / "tokenizer")
    return folder / "tokenizer" / "tokenizer.model"


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path: Path) -> None:
    model = train(tmp_path)
    book = write_book(tmp_path)
    message = refused(small_data(book, tokenizer=str(model), vocab_size=500), tmp_path / "data")
    assert f"data.vocab_size must be at least that of data.tokenizer {model} (600), got 500: use 600" in message
    data = small_data(book, tokenizer=str(model))
    assert prepared_from(data, tmp_path / "data").tokenizer.read_bytes() == model.read_bytes()
    assert "cannot be read" in refused(small_data(book, tokenizer=str(tmp_path / "no.model")), tmp_path / "other")
    model.write_bytes(b"another")
    assert "is not the one that" in refused(data, tmp_path / "data", by=load)


def megatron_data(prefix: Path, sequences: list[list[int]], *, dtype: type = np.int32) -> Path:
    import torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in sequences:
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix.with_name(f"{prefix.name}.bin")


def test_data_prepared_for_megatron_is_used_in_place(tmp_path: Path) -> None:
    model = train(tmp_path)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 600, size).tolist() for size in rng.integers(1, 90, 40)]
    tokens = megatron_data(tmp_path / "old_text_document", sequences)
    before = tokens.read_bytes()
    for number, path in enumerate((tokens, tmp_path / "old_text_document")):
        data = small_data(path, tokenizer=str(model))
        prepared = prepared_from(data, tmp_path / f"data{number}")
        (part,) = prepared.parts
        assert (part.tokens, part.documents, part.words) == (sum(map(len, sequences)), 40, None)
        assert prepared.prefix(part) == tmp_path / "old_text_document"
        assert not list((tmp_path / f"data{number}").glob("*.bin"))
        (tokens_read,) = iter_sequences(prepared.prefix(part), sequences=np.array([3, 7]))
        assert tokens_read.tolist() == sequences[3] + sequences[7]
    assert tokens.read_bytes() == before
    assert "data.tokenizer is not set" in refused(small_data(tokens), tmp_path / "data9")


def test_broken_or_foreign_megatron_data_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path)
    tokens = megatron_data(tmp_path / "old", [[1, 2, 600], [4, 5]])
    data = small_data(tokens, tokenizer=str(model))
    assert "old.bin has token 600, which the tokenizer of 600 pieces" in refused(data, tmp_path / "data")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert "old.bin has 19 bytes where its index says 20: copy it again" in refused(data, tmp_path / "data1")
    index = tmp_path / "old.idx"
    content = index.read_bytes()
    for size in (0, 20, len(content) - 1):
        index.write_bytes(content[:size])
        assert "old.idx is cut short" in refused(data, tmp_path / "data2")
    index.write_bytes(b"x" * 200)
    assert "old.idx is not a Megatron index" in refused(data, tmp_path / "data3")
    index.unlink()
    assert "has no index" in refused(data, tmp_path / "data4")


def test_counts_are_the_same_for_any_token_type(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int32, np.int64):
        megatron_data(tmp_path / dtype.__name__, [[5, 5, 1], [0]], dtype=dtype)
        assert histogram(tmp_path / dtype.__name__, vocab_size=7).tolist() == [1, 1, 0, 0, 0, 2, 0]
