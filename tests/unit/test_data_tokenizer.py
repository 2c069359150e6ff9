"""The tokenizer is lossless; a model that is not, or a wrong vocabulary size, is refused."""

import gzip
import io
import json
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from configs.errors import InputError
from data_pipeline import prepare, sentencepiece_tokenizer
from data_pipeline.portable import check_portable
from data_pipeline.prepare import prepare_data
from data_pipeline.sentencepiece_tokenizer import train_tokenizer
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.command_line import Call, refused, write_run
from tests.support.data import BOOK, small_data, write_book


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([BOOK], vocab_size=600, out=tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def foreign_model(folder: Path, **options: object) -> Path:
    model = io.BytesIO()
    exact = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BOOK.split("\n")), model_writer=model, vocab_size=500, minloglevel=3, **exact | options
    )
    file = folder / "foreign.model"
    file.write_bytes(model.getvalue())
    return file


@given(st.text(max_size=200).map(lambda text: text.replace("\u2581", "")))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.end_of_document not in tokens


def test_encoding_by_lines_is_encoding_in_one_go(tokenizer: Tokenizer) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(BOOK)
    assert tokenizer.encode(BOOK) == whole
    assert len(whole) < 0.6 * len(BOOK)
    texts = ["", "\n", "one\n\n", BOOK, "a \x0b\x85\u2028b\r\nc\rd", "x" * 1000, "\n" * 500]
    each = [ids.tolist() for ids in tokenizer.encode_each(texts)]
    assert each == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in each] == texts
    assert tokenizer.encode_each([]) == []


def test_text_decoded_token_by_token_is_the_whole_text(tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    by_bytes = tokenizer.encode("\x00")[0]  # the pieces of the bytes follow one another
    assert list(tokenizer.decode_each([by_bytes + byte for byte in "日".encode()])) == ["日"]
    for _ in range(2000):
        raw = bytearray("".join(chance.choices("aé日👍€\u0301\ufffd\U0010ffff <", k=4)).encode())
        for _ in range(chance.randrange(3)):  # no longer UTF-8
            raw[chance.randrange(len(raw))] = chance.choice(b"\xe2\x82\xf0\x9f\xed\xa0\xc0\xff\x41\xf4\x90")
        ids = [by_bytes + byte for byte in raw]
        for _ in range(chance.randrange(3)):  # control pieces and others in between
            ids.insert(chance.randrange(len(ids) + 1), chance.randrange(tokenizer.vocab_size))
        assert "".join(tokenizer.decode_each(ids)) == tokenizer.decode(ids), ids


def test_rows_of_a_padded_embedding_have_no_text(tokenizer: Tokenizer) -> None:
    rows = [tokenizer.vocab_size, tokenizer.vocab_size + 63]
    ids = [rows[0], *(id for each in tokenizer.encode("日 once") for id in (each, rows[1]))]
    assert tokenizer.decode(ids) == "日 once"
    assert "".join(tokenizer.decode_each(ids)) == "日 once"


def test_a_model_whose_pieces_hold_newlines_is_encoded_in_one_go(tmp_path: Path) -> None:
    model = foreign_model(tmp_path, user_defined_symbols=["\n\n"])
    text = "a " * 100 + "\n\ntwo\n"  # other models' texts are cut behind the first newline after 200 characters
    whole = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
    assert load_tokenizer(model).encode(text) == whole


def test_the_same_text_gives_the_same_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter([BOOK]), vocab_size=600, out=tmp_path / "again.model")
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    assert again.sha256 == tokenizer.sha256
    assert again.vocab_size == 600
    assert [file.name for file in tmp_path.iterdir()] == ["again.model"]


def test_every_file_has_its_share_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prepare, sentencepiece_tokenizer):
        monkeypatch.setattr(module, "SAMPLE_CHARACTERS", len(BOOK))
    # a hundredth of their text on disk, and all of it fewer bytes than the sample has characters
    files = [tmp_path / "lower.gz", tmp_path / "upper.gz"]
    for file, text in zip(files, (BOOK.lower(), BOOK.upper()), strict=True):
        file.write_bytes(gzip.compress(text[:9000].encode() * 40))
    prepared = prepare_data(small_data(*files), folder=tmp_path / "data", progress=False)
    lower, upper = (len(load_tokenizer(prepared.tokenizer).encode(word)) for word in ("statement", "STATEMENT"))
    assert lower == upper


def test_a_vocabulary_too_large_for_the_text_names_the_largest(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match=r"data.vocab_size 9999 is larger than the \d+ the text allows: use") as caught:
        train_tokenizer([BOOK[:3000]], vocab_size=9999, out=out)
    assert not out.exists()
    largest = int(re.findall(r"use (\d+) or less", str(caught.value))[0])
    assert train_tokenizer([BOOK[:3000]], vocab_size=largest, out=out).vocab_size == largest


def test_ctrl_c_ends_the_training_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def train_in_cpp(*, sentence_iterator: Iterator[str], **_: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as code that is not Python's
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(3)
        read.extend(sentence_iterator)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train_in_cpp)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([BOOK], vocab_size=600, out=tmp_path / "tokenizer.model")
    assert time.monotonic() - began < 2
    assert not read


@pytest.mark.usefixtures("folder")
def test_prepare_tells_what_it_does_in_80_columns(
    trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = folder / "a folder with a long name for the texts 日本語" / "and another one below it"
    below.mkdir(parents=True)
    (below / "book.txt").write_text(BOOK, encoding="utf-8")
    write_run(folder, data={"sources": [str(below / "book.txt")]})
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "train_tokenizer", interrupted)
        told, sample, last = trainshort("prepare", "run.yaml", "--set", "data.split=0.1").error.splitlines()
    assert told == "training the tokenizer"
    assert last == "stopped: start it again to continue: trainshort prepare run.yaml --set data.split=0.1"
    told, sample, part = trainshort("prepare", "run.yaml").error.splitlines()
    assert told == "training the tokenizer"
    assert re.match("sample for the tokenizer +━", sample)
    assert re.match(r"\S+\.\.\.\S.*/book\.txt +━", part)
    assert re.search(r"━ [\d.]+/[\d.]+ kB +\d:\d\d:\d\d \d:\d\d:\d\d *$", part)
    assert max(map(cell_len, (sample, part))) <= 80
    write_run(folder, data={"dir": "other"})
    assert trainshort("--quiet", "prepare", "run.yaml").error == ""


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_vocabulary_too_small_for_the_text_names_the_least(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x4E00, 0x5200)))
    with pytest.raises(InputError, match="use 1283 or more"):
        train_tokenizer([text], vocab_size=300, out=tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match="no tokenizer of data.vocab_size 300 can be trained on this text"):
        train_tokenizer(["\n"], vocab_size=300, out=tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model type unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization nmt_nfkc"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"byte_fallback": False}, "no byte_fallback"),
        ({"eos_id": -1}, "no end piece"),
    ],
)
def test_a_model_that_is_not_portable_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(foreign_model(tmp_path, **options))


@pytest.mark.parametrize("symbol", ["  ", "\u2581\u2581", "a b", " the", "<| user |>"])
def test_symbols_that_no_export_can_hold_are_refused(tmp_path: Path, symbol: str) -> None:
    model = foreign_model(tmp_path, user_defined_symbols=[symbol])
    with pytest.raises(InputError, match="encode differently in other runtimes, so the model could not be exported"):
        check_portable(load_tokenizer(model))
    data = small_data(write_book(tmp_path), tokenizer=str(model), vocab_size=500)
    with pytest.raises(InputError, match="use one without user-defined symbols that hold spaces"):
        prepare_data(data, folder=tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()


def test_symbols_that_an_export_can_hold_are_accepted(tmp_path: Path) -> None:
    symbols = ["<|user|>", "\n\n", "\t", "the", "abc", "bcd", "\u00a0"]
    check_portable(load_tokenizer(foreign_model(tmp_path, user_defined_symbols=symbols, control_symbols=["<c d>"])))


def test_an_end_piece_that_is_text_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(foreign_model(tmp_path, control_symbols=["<end>"], eos_piece="<end>")).check(vocab_size=500)
    assert "ends documents" not in caplog.text
    load_tokenizer(foreign_model(tmp_path, user_defined_symbols=["</s>"])).check(vocab_size=500)
    assert "foreign.model gives the token that ends documents for '</s>' in a text too" in caplog.text


@pytest.mark.usefixtures("folder")
def test_check_refuses_a_tokenizer_that_prepare_refuses(trainshort: Call, folder: Path) -> None:
    model = foreign_model(folder, user_defined_symbols=["  "])
    write_run(folder, data={"tokenizer": model.name, "vocab_size": 500})
    assert "could not be exported" in refused(trainshort, "check", "run.yaml")
    assert "could not be exported" in refused(trainshort, "prepare", "run.yaml")
    # whether it exists is for `prepare`
    model.unlink()
    assert trainshort("check", "run.yaml").code == 0
    assert "foreign.model cannot be read" in refused(trainshort, "prepare", "run.yaml")


@pytest.mark.usefixtures("folder")
def test_check_says_which_formats_cannot_hold_a_model(trainshort: Call) -> None:
    assert "cannot hold" not in trainshort("check", "run.yaml").out
    for key, value in (("position", "rotary"), ("feed_forward", "100"), ("window", "16")):
        answer = trainshort("check", "run.yaml", "--set", f"model.{key}={value}")
        assert answer.code == 0
        assert f"cannot hold model.{key} {value} (it holds " in answer.out
        report = json.loads(trainshort("check", "run.yaml", "--set", f"model.{key}={value}", "--json").out)
        assert report["export_problems"]["hf"].endswith(": export with --format hf --with-code")


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "no.model")
    (tmp_path / "text.model").write_text("some text")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")
