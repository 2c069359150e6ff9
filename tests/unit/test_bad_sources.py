"""Text that cannot be prepared, through the real command line: one clear line, and no data counts as prepared."""

import gzip
import json
from pathlib import Path

import pytest

from tests.support.command_line import Call, contents, refused, write_run
from tests.support.data import BOOK


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


PAGE = BOOK[:4000]
SOURCES: dict[str, tuple[str, bytes, str]] = {
    "empty": (
        "empty.txt",
        b"",
        "data source empty.txt holds no text: remove it from data.sources or give another",
    ),
    "not UTF-8": (
        "latin.txt",
        BOOK.encode() + b"caf\xe9 ",
        f"data source latin.txt is not UTF-8 at byte {len(BOOK.encode()) + 3}: convert it to UTF-8",
    ),
    "a broken line of jsonl": (
        "broken.jsonl",
        jsonl({"text": PAGE}) + b'{"text": "cut\n',
        "data source broken.jsonl, line 2 is not JSON (Unterminated string starting at at column 10): "
        'write one {"text": ...} per line',
    ),
    "a record without text": (
        "other.jsonl",
        jsonl({"text": PAGE}, {"body": PAGE}),
        'data source other.jsonl, line 2 has no `text`: write one {"text": ...} per record',
    ),
    "text that is a number": (
        "number.jsonl",
        jsonl({"text": 7}),
        "data source number.jsonl, line 1: `text` must be a string, got '7': fix or remove the record",
    ),
    "not gzip": (
        "broken.txt.gz",
        BOOK.encode(),
        "data source broken.txt.gz is broken (Error -3 while decompressing data: incorrect header check): "
        "copy or compress it again",
    ),
    "gzip cut short": (
        "cut.jsonl.gz",
        gzip.compress(jsonl({"text": BOOK}))[:-20],
        "data source cut.jsonl.gz is cut short: copy or compress it again",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_broken_source_is_named_and_nothing_prepared(trainshort: Call, folder: Path, name: str) -> None:
    file, content, expected = SOURCES[name]
    (folder / file).write_bytes(content)
    write_run(folder, data={"sources": ["book.txt", file]})
    before = contents(folder)
    answer = trainshort("prepare", "run.yaml")
    assert answer.code == 2
    assert answer.out == ""
    # its progress bars come first
    *_, last = answer.error.splitlines()
    assert last == f"error: {expected}"
    assert answer.error.count("error: ") == 1
    assert {path: content for path, content in contents(folder).items() if path in before} == before
    assert refused(trainshort, "train", "run.yaml") == (
        f"data is not prepared in data (relative to {folder}): run `trainshort prepare run.yaml`"
    )


def test_missing_sources_are_refused_first(trainshort: Call, folder: Path) -> None:
    for path, expected in (
        ("no.txt", f"data source no.txt does not exist: check the path, it is relative to {folder}"),
        ("*.md", "data source *.md matches no file: check the pattern"),
        (".", "data source . is a folder: give its files, for example ./*.txt"),
    ):
        write_run(folder, data={"sources": ["book.txt", path]})
        assert refused(trainshort, "prepare", "run.yaml") == expected


def test_a_vocabulary_too_large_says_how_large_it_may_be(trainshort: Call, folder: Path) -> None:
    (folder / "book.txt").write_text(PAGE, encoding="utf-8")
    answer = trainshort("prepare", "run.yaml", "--set", "data.vocab_size=5000")
    assert answer.code == 2
    *_, last = answer.error.splitlines()
    assert last.startswith("error: data.vocab_size 5000 is larger than the ")
    largest = int(last.split(" is larger than the ")[1].split()[0])
    assert last.endswith(f"the text allows: use {largest} or less, or add text")
    assert [file.name for file in (folder / "data").iterdir()] == [".lock"], "there is nothing to continue from"
    assert trainshort("prepare", "run.yaml", "--set", f"data.vocab_size={largest}", "--set", "data.split=0").code == 0


def test_a_separator_without_effect_is_warned_of(trainshort: Call, folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "records.jsonl").write_bytes(jsonl({"text": BOOK}))
    write_run(folder, data={"sources": ["*.txt"]})

    def warning(*sets: str) -> str:
        answer = trainshort("prepare", "run.yaml", *[word for each in sets for word in ("--set", each)])
        assert answer.code == 0, answer
        return next((line for line in answer.error.splitlines() if "document_separator" in line), "")

    cuts_none = warning(r"data.document_separator='\n\n'", "data.dir=a")
    assert cuts_none == (
        r"data.document_separator '\n\n' cuts none of the text files, so each is one document: "
        r'a line break is "\n" in double quotes'
    )
    assert warning(r'data.document_separator="\n\n"', "data.dir=b") == ""
    assert "has no effect" in warning("data.document_separator=x", "data.dir=c", "data.sources=[records.jsonl]")
    assert warning("data.document_separator=<|x|>", "data.dir=d", "data.sources=[book.txt, records.jsonl]") == ""
