"""A file is read as what it is, or refused in one line: by its name or, where that does not tell, by its content."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from configs.errors import InputError
from configs.schema import Data, Source
from data_pipeline.kinds import check_kind
from data_pipeline.manifest import describe_inputs
from data_pipeline.prepare import prepare_data
from data_pipeline.sentencepiece_tokenizer import train_tokenizer
from data_pipeline.sources import source_chunks, source_files
from data_pipeline.text import file_stream
from tests.support.data import BOOK, small_data, write_book

PAGES = [BOOK[:4000], BOOK[4000:8000]]
RECORDS = b"".join(json.dumps({"id": 7, "text": page}).encode() + b"\n" for page in PAGES)


def documents(path: Path | str) -> list[str]:
    text = "".join(
        chunk.text + ("\0" if chunk.ends_document else "")
        for chunk in source_chunks(Source(path=str(path)), separator=None)
    )
    return text.split("\0")[:-1]


def problem(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        documents(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"data source {path} ")


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": PAGES}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", bytes),
        ("a.Json", bytes),
        ("a.JSONL", bytes),
        ("a.ndjson", bytes),
        ("a.jsonlines", bytes),
        ("a", bytes),
        ("a.records", bytes),
        ("a.json.gz", gzip.compress),
        ("a.JSONL.GZ", gzip.compress),
        ("a.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
        ("a.jsonl.zstd", zstandard.compress),
        ("a.Jsonl.XZ", lzma.compress),
        # no ending of a compression, or that of another one
        ("a.jsonl", gzip.compress),
        ("a.json.gz", zstandard.compress),
        ("a", lzma.compress),
    ],
)
def test_records_are_read_under_any_name(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(RECORDS))
    assert documents(tmp_path / name) == PAGES


def test_records_are_found_behind_marks_and_blank_lines(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    marked = b"".join(mark + line + b"\n" for line in RECORDS.splitlines())
    for before in (mark, mark + b"\n", mark + b"\r\n", b"\n" * 70_000):
        (tmp_path / "a").write_bytes(before + (RECORDS if before == mark else marked))
        assert documents(tmp_path / "a") == PAGES, before[:9]


@pytest.mark.parametrize("name", ["a.PARQUET", "a.pq", "a", "a.part-000"])
def test_parquet_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(parquet())
    assert documents(tmp_path / name) == PAGES


@pytest.mark.parametrize("name", ["a.TXT", "a.txt.GZ", "a.md", "a.py", "a.c"])
def test_a_name_that_says_text_is_believed(tmp_path: Path, name: str) -> None:
    for text in ('{\n "key": [1, 2]\n}\nand more text\n', "[1, 2]\n", '["a", "b"]\n', "<html>\n", "a,b\n1,2\n"):
        content = (text * 9).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        assert documents(tmp_path / name) == [text * 9]


def test_text_without_a_known_ending_stays_text(tmp_path: Path) -> None:
    for text in ("[[Link]] and text\n", "[1] A footnote\n", "{curly} text\n", "{ body: red }\n", BOOK):
        for name in ("a", "a.raw", "a.clj"):
            (tmp_path / name).write_text(text)
            assert documents(tmp_path / name) == [text]


def text_id(value: object) -> str:
    return value if isinstance(value, str) else "content"


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as pack:
            pack.writestr("a.txt", BOOK)
    else:
        with tarfile.open(fileobj=file, mode="w") as pack:
            pack.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na\n", "is a table: write one {"),
        ("a.TSV.gz", gzip.compress(b"text\na\n"), "is a table: write one {"),
        ("a.html", b"<p>a", "is markup: extract its text"),
        ("a", b"\n<!DOCTYPE html><html>", "is markup: extract its text"),
        ("a", b"<?xml version='1.0'?>", "is markup: extract its text"),
        ("a.pdf", b"%PDF-1.7\nabc", "is a PDF file, not text"),
        ("a.xlsx", archive("zip"), "is a zip archive (or an office document"),
        ("a", json.dumps([BOOK * 9] * 3).encode(), "begins like JSON, but not with one record per line"),
        ("a", b'["only one"]', "begins like JSON, but not with one record per line"),
        ("a.tar.gz", gzip.compress(archive("tar")), "is an archive, not text"),
        ("a.txt.bz2", bz2.compress(BOOK.encode()), "is compressed with bzip2 or lz4: compress it with gzip"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file: write one {"),
        ("a.parquet.gz", gzip.compress(parquet()), "is a compressed parquet file: decompress it"),
        ("a.txt", parquet(), "holds NUL bytes (the first is byte "),
        ("a.npy", bytes(range(200)), "holds NUL bytes (the first is byte 0): it is binary"),
        ("a.bin", b"\1\2\3", "holds token ids: to train on prepared data"),
        ("a.txt", BOOK.encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8: convert it"),
        ("a.jsonl", RECORDS.decode().encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8: convert it"),
        ("a.txt", BOOK.encode("utf-16-le"), "holds NUL bytes (the first is byte 1): it is binary, or UTF-16"),
        ("a.json", json.dumps([{"text": "a"}]).encode(), "is one JSON array, not one record per line: write one {"),
        ("a.jsonl", b'\xef\xbb\xbf [{"text": "a"},\n', "is one JSON array, not one record per line: write one {"),
        ("a", json.dumps([{"text": "a"}], indent=1).encode(), "begins like JSON, but not with one record per line"),
        ("a", b'["a", "b"]', "begins like JSON, but not with one record per line"),
        ("a", json.dumps({"text": "a"}, indent=1).encode(), "begins like JSON, but not with one record per line"),
    ],
    ids=text_id,
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem(tmp_path / name).startswith(message)
    # and before any work is done
    with pytest.raises(InputError, match="data source"):
        prepare_data(small_data(tmp_path / name), folder=tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"text": "a"}, indent=1).encode(), ", line 1 is not JSON"),
        ("a.json", b'{"body": "a"}\n', ", line 1 has no `text`"),
        ("a", b'{"body": "a"}\n', ", line 1 has no `text`"),
        ("a.txt.gz", BOOK.encode(), "is broken (Error -3"),
    ],
    ids=text_id,
)
def test_records_that_are_none_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in problem(tmp_path / name)


def test_records_in_a_file_named_as_text_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(RECORDS)
    (tmp_path / "b.txt").write_text('{"a": 1,\n "text": 2}\n')
    with caplog.at_level(logging.WARNING):
        check_kind(tmp_path / "b.txt")
        assert not caplog.records
        check_kind(tmp_path / "a.txt")
    assert "begins with a JSON record but is read as plain text" in caplog.text


def test_evaluation_text_is_read_by_the_same_rules(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([BOOK], vocab_size=400, out=tmp_path / "tokenizer.model").path
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(RECORDS)
    streams = [file_stream(tmp_path / name, tokenizer).tokens.tolist() for name in ("a.json", "a.jsonl")]
    assert streams[0] == streams[1]


def test_nothing_that_a_pattern_matches_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/b.txt"):
        (folder / name).write_text(name)
    assert "matches the folder" in problem(folder / "*")
    assert f"matches the folder {folder}/inner but no file in it: match files only" in problem(folder / "*")
    for pattern in ("**", "**/*", "**/*.txt"):
        assert documents(folder / pattern) == ["a.txt", "inner/b.txt"]
    (folder / "c.txt").symlink_to("nowhere")
    for path in ("*.txt", "c.txt", "**"):
        assert "is a link to nowhere, which does not exist: remove or fix it" in problem(folder / path)
    (folder / "c.txt").unlink()
    os.mkfifo(folder / "c.txt")
    for path in ("*.txt", "c.txt"):
        assert "is a pipe, socket or device" in problem(folder / path)


def test_a_folder_of_parts_names_the_pattern_to_give(tmp_path: Path) -> None:
    folder = tmp_path / "data.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / "part-000.parquet").write_bytes(parquet())
    assert f"is a folder: give its files, for example {folder}/*.parquet" in problem(folder)
    assert "matches the folder" in problem(tmp_path / "*.parquet")
    assert documents(folder / "*.parquet") == documents(tmp_path / "**" / "*.parquet") == PAGES
    partition = tmp_path / "by-language" / "language=en"
    partition.mkdir(parents=True)
    (partition / "part-000.parquet").write_bytes(parquet())
    assert problem(partition.parent).endswith("/by-language/*/*.parquet")


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    write_book(tmp_path)
    # not by chmod: root may read everything
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith(("closed", "book.txt")))
    assert "cannot be read (Permission denied)" in problem(tmp_path / "*.txt")
    assert "closed, which cannot be listed" in problem(tmp_path / "*" / "*.md")
    assert "closed, which cannot be listed" in problem(tmp_path / "**" / "*.md")


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    book = write_book(tmp_path)
    (tmp_path / "link.txt").symlink_to(book)
    (tmp_path / "hard.txt").hardlink_to(book)
    assert documents(tmp_path / "*.txt") == [BOOK]
    assert len(source_files(str(tmp_path / "*.txt"))) == 1


def test_sources_that_share_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = write_book(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.md").symlink_to(book)
    (tmp_path / "hard.md").hardlink_to(book)
    for other in ("./book.txt", str(book), "*.txt", "book.*", "link.md", "hard.md", f"../{tmp_path.name}/book.txt"):
        with pytest.raises(InputError, match="both name the file .*: name it in one of them"):
            describe_inputs(small_data("book.txt", other))
        with pytest.raises(InputError, match="both name the file"):
            describe_inputs(small_data(("book.txt", 1.0), (other, 2.0)))


def test_names_that_are_not_utf8_are_prepared(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"b\xfcch.jsonl")).write_bytes(RECORDS)
    (folder / os.fsdecode(b"b\xfcch.parquet")).write_bytes(parquet())
    data: Data = small_data(tmp_path / "caf*" / "*.jsonl", tmp_path / "caf*" / "*.parquet", vocab_size=400, split=0.0)
    for _ in range(2):  # the second call compares the names
        assert prepare_data(data, folder=folder / "data", progress=False).documents == 4
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 at byte 0"):
        documents(tmp_path / "caf*" / "*.txt")


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (File name too long)" in problem("x" * 300)
    assert "does not exist" in problem("a\0b")
    assert "does not exist" in problem(write_book(tmp_path) / "below")
