"""Evaluation text is the file's text and nothing else."""

import gzip
import json
import lzma
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from data_pipeline.manifest import Prepared
from data_pipeline.prepare import prepare_data
from data_pipeline.split import held_out_sequences, training_sequences
from data_pipeline.text import file_stream, held_out_stream, unigram_perplexity
from data_pipeline.tokenizer import load_tokenizer
from tests.support.data import BOOK, small_data, write_book


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare_data(small_data(write_book(folder)), folder=folder / "data", progress=False)


def test_a_file_is_one_stream_verbatim(prepared: Prepared, tmp_path: Path) -> None:
    text = BOOK.replace("\n", "\r\n") + "no newline at the end"
    for name, content in (
        ("a.txt", text.encode()),
        ("a.txt.gz", gzip.compress(text.encode())),
        ("a.raw.xz", lzma.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        stream = file_stream(tmp_path / name, prepared.tokenizer)
        tokenizer = load_tokenizer(prepared.tokenizer)
        assert tokenizer.decode(stream.tokens) == text
        assert stream.tokens.tolist() == tokenizer.encode(text)
        assert (stream.name, stream.words, stream.tokens.dtype) == (name, len(text.split()), np.uint16)


def test_records_are_joined_by_the_end_token(prepared: Prepared, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two", "three", BOOK)))
    tokenizer = load_tokenizer(prepared.tokenizer)
    one, three, book = (tokenizer.encode(text) for text in ("one two", "three", BOOK))
    stream = file_stream(file, prepared.tokenizer)
    assert stream.tokens.tolist() == [*one, 2, *three, 2, *book]
    assert stream.words == 3 + len(BOOK.split())


def test_a_wrong_file_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            file_stream(path, prepared.tokenizer)
        return str(caught.value)

    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe4")
    assert "holds no text" in problem(tmp_path / "empty.txt")
    assert "is not UTF-8 at byte 3" in problem(tmp_path / "latin.txt")
    assert "does not exist" in problem(tmp_path / "no.txt")
    assert problem(tmp_path).endswith(" is a folder: give one file of it")
    assert "is not a single file" in problem(tmp_path / "*.txt")


def test_the_held_out_stream_is_the_held_out_sequences(prepared: Prepared) -> None:
    stream = held_out_stream(prepared, split=0.2)
    count = prepared.parts[0].sequences
    assert len(stream.tokens) == pytest.approx(0.2 * prepared.tokens, rel=0.5)
    text = load_tokenizer(prepared.tokenizer).decode(stream.tokens)
    assert stream.words == len(text.split())
    assert len(held_out_sequences(count, share=0.2)) == round(count * 0.2)
    with pytest.raises(InputError, match="data.split is 0"):
        held_out_stream(prepared, split=0.0)


def test_a_stream_knows_where_its_documents_begin(prepared: Prepared, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    file = tmp_path / "articles.jsonl"
    long = BOOK * (1 + 50_000 // len(BOOK))  # several sequences
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (BOOK, long, BOOK, BOOK, long, BOOK)))
    data = small_data(file, tokenizer=str(prepared.tokenizer))
    prepared = prepare_data(data, folder=tmp_path / "data", progress=False)
    dataset = IndexedDataset(str(prepared.prefix(prepared.parts[0])))
    document_of = {
        sequence: number
        for number, (first, end) in enumerate(pairwise(dataset.document_indices.tolist()))
        for sequence in range(first, end)
    }
    starts, joins, length, before = [], list[int](), 0, None
    for sequence in held_out_sequences(len(dataset), share=0.5).tolist():
        joins.append(length)
        if document_of[sequence] != before:
            starts.append(length)
        length, before = length + len(dataset[sequence]), document_of[sequence]
    assert len(starts) > 1
    assert len(starts) < len(held_out_sequences(len(dataset), share=0.5)), "parts of one document are one"
    held_out = held_out_stream(prepared, split=0.5)
    assert (held_out.documents.tolist(), held_out.joins.tolist()) == (starts, joins)
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two and more", "three")))
    stream, tokenizer = file_stream(records, prepared.tokenizer), load_tokenizer(prepared.tokenizer)
    ends = np.flatnonzero(stream.tokens == tokenizer.end_of_document)
    assert stream.documents.tolist() == [0, *(ends + 1).tolist()]
    assert len(ends) == 2, "none at the end"


def test_unigram_perplexity_is_that_of_the_training_text_alone(prepared: Prepared) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prepared.prefix(prepared.parts[0])))
    training = Counter()
    for sequence in training_sequences(len(dataset), share=prepared.split):
        training.update(dataset[int(sequence)].tolist())
    tokens = held_out_stream(prepared, split=prepared.split).tokens
    total = sum(training.values()) + prepared.vocab_size
    loss = -sum(math.log((training[token] + 1) / total) for token in tokens.tolist()) / len(tokens)
    assert unigram_perplexity(prepared, tokens) == pytest.approx(math.exp(loss), rel=1e-9)


@pytest.mark.parametrize("name", ["unigram.npy", "part-000.words.npy"])
def test_counts_that_are_missing_or_damaged_are_refused(prepared: Prepared, tmp_path: Path, name: str) -> None:
    copied = replace(prepared, folder=shutil.copytree(prepared.folder, tmp_path / "copied"))

    def read() -> None:
        unigram_perplexity(copied, held_out_stream(copied, split=copied.split).tokens)

    for damage in (
        lambda file: file.write_bytes(file.read_bytes()[:150]),
        lambda file: file.write_bytes(b""),
        Path.unlink,
    ):
        damage(copied.folder / name)
        with pytest.raises(InputError, match=rf"prepared data .*/{name} cannot be read \(.+\): copy it"):
            read()
