"""Text is read from files exactly as it was written; an error in a file is reported in one line."""

import gzip
import json
import lzma
import re
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Source
from data_pipeline.python_docs import python_docs
from data_pipeline.reading import iter_lines
from data_pipeline.sources import Chunk, cut_documents, source_chunks

TEXT = "Zwölf Boxkämpfer\r\njagen  Viktor\n\n\tquer \U0001f600 über\n"


def documents_of(chunks: Iterable[Chunk]) -> list[str]:
    """Join chunks to documents."""
    documents, document = [], ""
    for chunk in chunks:
        document += chunk.text
        if chunk.ends_document:
            documents.append(document)
            document = ""
    assert document == ""
    return documents


def read(path: Path | str, *, separator: str | None = None) -> list[str]:
    return documents_of(source_chunks(Source(path=str(path)), separator=separator))


def problem(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_plain_and_compressed_files_give_their_text_verbatim(tmp_path: Path, ending: str, pack) -> None:
    text = tmp_path / f"book.txt{ending}"
    # a file may hold two streams, as `cat a.gz b.gz` writes them
    text.write_bytes(pack(TEXT.encode()) + pack(b"more\n"))
    assert read(text) == [TEXT + "more\n"]
    records = tmp_path / f"book.jsonl{ending}"
    records.write_bytes(pack(jsonl(TEXT, "second")) + pack(b"\n"))
    assert read(records) == [TEXT, "second"]


def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2, 3], "text": [TEXT, "second", "third"]})
    pyarrow.parquet.write_table(table, tmp_path / "book.parquet", row_group_size=2)
    assert read(tmp_path / "book.parquet") == [TEXT, "second", "third"]


def test_a_glob_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]


def test_a_separator_cuts_a_text_file_into_documents(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("one<end><end>two<end>\nthree")
    assert read(file, separator="<end>") == ["one", "two", "\nthree"]


def joined(text: str, *, part: int, size: int, separator: str | None) -> list[str]:
    """Read a text in parts of `part` characters, cut it into chunks, and join the chunks to documents."""
    parts = [text[start : start + part] for start in range(0, len(text), part)]
    chunks = list(cut_documents(parts, size=size, separator=separator))
    assert all(len(chunk.text) <= size for chunk in chunks)
    return documents_of(chunks)


@given(st.text("ab \n", max_size=300), st.integers(1, 20), st.integers(1, 40))
def test_chunks_of_any_size_join_to_the_text(text: str, part: int, size: int) -> None:
    assert joined(text, part=part, size=size, separator=None) == ([text] if text else [])


def test_a_separator_is_found_across_reads_and_chunks() -> None:
    for separator, letters in product(("|", "||", "|a|"), product("|a", repeat=7)):
        text = "".join(letters)
        expected = [document for document in text.split(separator) if document]
        for part, size in product(range(1, 6), range(1, 5)):
            assert joined(text, part=part, size=size, separator=separator) == expected


@given(st.text("ab\r\n\ufeff", max_size=60), st.integers(1, 9), st.sampled_from(["\n\n", "\r\n\r\n", "\na\n", "b"]))
def test_a_separator_matches_both_line_ends(text: str, part: int, separator: str) -> None:
    pattern = separator.replace("\r\n", "\n").replace("\n", "\r?\n")
    expected = [document.lstrip("\ufeff") for document in re.split(pattern, text)]
    assert joined(text, part=part, size=99, separator=separator) == [document for document in expected if document]


def test_line_ends_and_marks_do_not_hide_a_separator(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    # as `cat` joins files of Windows
    file.write_bytes("\ufeffone\r\n\r\n\ufefftwo\r\nlines\r\n\r\nthree \ufeff".encode())
    for separator in ("\n\n", "\r\n\r\n"):
        assert read(file, separator=separator) == ["one", "two\r\nlines", "three \ufeff"]
    assert read(file) == ["one\r\n\r\n\ufefftwo\r\nlines\r\n\r\nthree \ufeff"]
    file.write_bytes(b"one\n---\ntwo")
    assert read(file, separator="\r\n---\r\n") == ["one", "two"]
    file.write_bytes(b"\xef\xbb\xbf" + b"x" * 65_536 + b"\xff")
    assert "is not UTF-8 at byte 65539" in problem(file)


def test_marks_in_jsonl_are_no_text(tmp_path: Path) -> None:
    file, mark = tmp_path / "a.jsonl", b"\xef\xbb\xbf"
    for content in (
        mark + b"\n" + jsonl("one"),
        mark + b"\r\n" + jsonl("one"),
        mark + jsonl("one"),
        jsonl("one") + mark,
    ):
        file.write_bytes(content)
        assert read(file) == ["one"]
    file.write_bytes(mark + jsonl("one") + mark + jsonl("\ufefftwo"))
    assert read(file) == ["one", "\ufefftwo"]
    file.write_bytes(mark + b"\n")
    assert "holds no text" in problem(file)


def test_fields_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    values = (
        b"9" * 5000,
        b"-" + b"9" * 5000,
        b"1." + b"9" * 5000,
        b"1e99999",
        b"NaN",
        b"-Infinity",
        b'"\\ud800"',
        b"[]" * 1,
    )
    file.write_bytes(b"".join(b'{"id": ' + value + b', "text": "one"}\n' for value in values))
    assert read(file) == ["one"] * len(values)
    file.write_bytes(b'{"text": ' + b"9" * 5000 + b"}\n")
    assert f"line 1: `text` must be a string, got '{'9' * 40}'" in problem(file)


def test_zst_windows_of_2_gib_are_read(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(2000))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(text.encode()) + compressor.flush()
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"  # pzstd writes these
    for content in (frame, frame + frame, skippable + frame + skippable + frame):
        (tmp_path / "a.txt.zst").write_bytes(content)
        assert read(tmp_path / "a.txt.zst") == [text * content.count(frame)]
    (tmp_path / "a.txt.zst").write_bytes(frame[:-5])
    assert "is cut short" in problem(tmp_path / "a.txt.zst")


def seconds_to_read(file: Path, megabytes: int) -> float:
    # words, and compressed, so that it is read and cut in many small blocks and chunks
    text = "seven7 " * (megabytes * 150_000)
    file.write_bytes(gzip.compress(json.dumps({"text": text}).encode(), compresslevel=1))
    started_at = time.process_time()
    chunks = list(source_chunks(Source(path=str(file)), separator=None))
    elapsed_seconds = time.process_time() - started_at
    assert sum(len(chunk.text) for chunk in chunks) == len(text)
    return elapsed_seconds


def test_one_huge_line_is_read_in_linear_time(tmp_path: Path) -> None:
    small, large = (min(seconds_to_read(tmp_path / "a.jsonl.gz", size) for _ in range(2)) for size in (3, 24))
    assert large < 16 * small + 0.1  # 8 times the text


def test_a_line_too_long_for_memory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl("one") + b"x" * 200_000)
    assert len(list(iter_lines(file, on_read=lambda _: None, longest=200_000))) == 2
    with pytest.raises(InputError, match="line 2 is longer than 199999 bytes: write one record per line"):
        list(iter_lines(file, on_read=lambda _: None, longest=199_999))


def test_a_long_file_is_cut_after_newlines(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a line of this book\n" * 20_000)
    chunks = list(source_chunks(Source(path=str(file)), separator=None))
    assert len(chunks) > 10
    assert all(chunk.text.endswith("\n") for chunk in chunks)
    assert [chunk.ends_document for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_python_docs_are_real_text_and_the_same_each_time() -> None:
    first, second = list(python_docs(limit=600_000)), list(python_docs(limit=600_000))
    assert first == second
    assert 600_000 <= sum(map(len, first)) < 2_000_000
    assert any("docstring" in text for text in first)
    assert len(set(first)) == len(first)


def test_missing_files_and_folders_say_what_to_do(tmp_path: Path) -> None:
    assert "does not exist: check the path" in problem(tmp_path / "no.txt")
    assert "matches no file: check the pattern" in problem(tmp_path / "*.txt")
    assert f"is a folder: give its files, for example {tmp_path}/*.txt" in problem(tmp_path)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.txt", b""), ("b.txt", b" \n\n"), ("a.gz", b""), ("a.zst", b""), ("a.jsonl", b"\n")):
        (tmp_path / name).write_bytes(content)
        assert f"{name} holds no text: remove it" in problem(tmp_path / name)


def test_text_that_is_not_utf8_is_refused_with_its_byte(tmp_path: Path) -> None:
    # a file is read in blocks of 65,536 bytes
    for before in (0, 65_535, 65_536, 200_001):
        (tmp_path / "a.txt").write_bytes(b"x" * before + "ä".encode("latin-1") + b"bc")
        assert f"is not UTF-8 at byte {before}: convert it" in problem(tmp_path / "a.txt")
        # cut inside a character
        (tmp_path / "a.txt").write_bytes(b"x" * before + "ä".encode()[:1])
        assert f"is not UTF-8 at byte {before}: convert it" in problem(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2 is not JSON (Expecting ',' delimiter at column 13)"),
        (b'{"content": "a"}', "line 2 has no `text`"),
        (b'["a"]', "line 2 has no `text`"),
        (b'{"text": 5}', "line 2: `text` must be a string, got '5'"),
        (b'{"text": null}', "line 2: `text` must be a string, got 'None'"),
        (b'{"text": "\xe4"}', "line 2 is not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud83d"}', r"line 2: `text` holds half a surrogate pair ('\ud83d')"),
        (b'{"text": ' + b"[" * 100_000, "line 2 is nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("first") + line + b"\n" + jsonl("third"))
    assert message in problem(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("ending", "pack"),
    # with a checksum: the zstd command writes one, this library does not by default
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)],
)
def test_broken_and_cut_archives_are_refused(tmp_path: Path, ending: str, pack) -> None:
    file = tmp_path / f"a.txt{ending}"
    whole = pack("".join(f"line {n * n}\n" for n in range(5000)).encode())
    for size in (len(whole) - 3, len(whole) // 2, 20):
        file.write_bytes(whole[:size])
        assert "is cut short: copy or compress it again" in problem(file)
    file.write_bytes(whole[:50] + bytes(100) + whole[150:])
    assert "is broken (" in problem(file)
    file.write_bytes(b"not compressed at all")
    assert "is broken (" in problem(file)
    file.write_bytes(whole + b"rubbish")
    assert "is broken (" in problem(file)


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), file)
    assert "has no column `text` (it has content)" in problem(file)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    assert "row 2: `text` must be a string, got 'None'" in problem(file)
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) * 9 for n in range(999)]}), file)
    whole = file.read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], b"", b"not parquet", whole[:40] + bytes(400) + whole[440:]):
        file.write_bytes(content)
        assert "is broken after row" in problem(file)
