"""A tokenizer.json gives the ids that its own library gives, and goes with a run from its data to its export."""

import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from data_pipeline.indexed import iter_sequences
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.prepare import prepare_data
from data_pipeline.text import file_stream
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.byte_level import VOCABULARY, change_json, train_byte_level
from tests.support.command_line import Call, refused, write_run
from tests.support.data import BOOK, small_data, write_book
from tests.support.evaluation import evaluate
from tests.support.one_rank import OneRank
from training.api import load
from training.checkpoint.read import open_checkpoint
from training.checkpoint.verify import verify_checkpoints
from training.export.run import export_checkpoint
from training.preflight import check_init_from

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: train_byte_level(folder / name, bloom=name == "bloom") for name in ("gpt", "bloom")}


@pytest.fixture(scope="module", params=["gpt", "bloom"])
def home(homes: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return homes[request.param]


@pytest.fixture(scope="module")
def ours(home: Path) -> Tokenizer:
    return load_tokenizer(home)


@pytest.fixture(scope="module")
def theirs(home: Path) -> Callable[[str], list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_library(ours: Tokenizer, theirs: Callable[[str], list[int]]) -> None:
    texts = [*EDGE_CASE_TEXTS, END, f"a{END} b", BOOK]
    for text, ids in zip(texts, ours.encode_each(texts), strict=True):
        assert ids.tolist() == theirs(text)
        assert ours.end_of_document not in ids, "it is plain text in a text"
        assert ours.decode(ids) == text
    assert ours.encode_each([]) == []
    assert (ours.vocab_size, ours.decode([ours.end_of_document])) == (VOCABULARY, "")


def test_long_texts_have_the_ids_of_the_whole(
    ours: Tokenizer, theirs: Callable[[str], list[int]], tmp_path: Path
) -> None:
    chance = random.Random(0)
    lines = [line for line in BOOK.split("\n") if line]
    between = ["\n", "\n\n", "\n \n", "  \n", ".\n\n", "\r\n", "\n   ", "\n\t"]
    text = "".join(chance.choice(lines)[: chance.randrange(60)] + chance.choice(between) for _ in range(4000))
    assert ours.encode(text) == theirs(text)
    file = write_book(tmp_path, text=text)
    data = small_data(file, tokenizer=str(ours.path), vocab_size=VOCABULARY)
    prepared = prepare_data(data, folder=tmp_path / "data", progress=False)
    (part,) = prepared.parts
    assert part.sequences > 5, "it was encoded in chunks"
    (tokens,) = iter_sequences(prepared.prefix(part), sequences=np.arange(part.sequences))
    assert tokens.tolist() == [*theirs(text), ours.end_of_document]
    assert file_stream(file, prepared.tokenizer).tokens.tolist() == theirs(text)
    assert part.words == len(text.split())


@given(text=st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'sa<|>"))))
def test_any_text_has_the_ids_of_the_library_and_its_bytes(
    ours: Tokenizer, theirs: Callable[[str], list[int]], text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)
    assert ours.spell([*ids, ours.end_of_document]) == text.encode()
    assert ours.decode(ids) == text


def test_text_decoded_token_by_token_is_the_whole(ours: Tokenizer) -> None:
    assert list(ours.decode_each(ours.encode("日👍"))) == ["日", "👍"]
    chance = random.Random(0)
    for _ in range(500):
        ids = [chance.randrange(VOCABULARY + 2) if chance.random() < 0.3 else chance.randrange(257) for _ in range(12)]
        assert "".join(ours.decode_each(ids)) == ours.decode(ids) == ours.spell(ids).decode(errors="replace"), ids


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "prefixed"])
def test_other_kinds_encode_too_and_say_that_they_change_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    models, special = tokenizers.models, ["</s>", "<unk>"]
    trained, trainer = {
        "wordpiece": (models.WordPiece(unk_token="<unk>"), tokenizers.trainers.WordPieceTrainer),
        "unigram": (models.Unigram(), partial(tokenizers.trainers.UnigramTrainer, unk_token="<unk>")),
        "prefixed": (models.BPE(unk_token="<unk>"), tokenizers.trainers.BpeTrainer),
    }[kind]
    tokenizer = tokenizers.Tokenizer(trained)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.WordPiece() if kind == "wordpiece" else tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator([BOOK[:9000]], trainer(vocab_size=350, special_tokens=special, show_progress=False))
    tokenizer.save(str(tmp_path / "mine.json"))
    ours = load_tokenizer(tmp_path / "mine.json")
    tokenizer.encode_special_tokens = True
    for text in (*EDGE_CASE_TEXTS, BOOK[:9000]):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert "".join(ours.decode_each(ids)) == ours.decode(ids)
    ours.check(vocab_size=400)
    told, *more = caplog.messages
    assert ("ends documents for '</s>' in a text too" in "".join(more)) == (kind == "unigram"), "its pieces hold it"
    assert "mine.json changes text: " in told
    assert '(its normalizer: {"type": "Lowercase"}); the model learns the changed text' in told


def test_a_change_that_looks_like_none_is_shown(
    homes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads((homes["gpt"] / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "nfc.json").write_text(json.dumps({**document, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    load_tokenizer(tmp_path / "nfc.json").check(vocab_size=VOCABULARY)
    assert r"nfc.json changes text: 'e\u0301 \xe9' comes back as '\xe9 \xe9' (its normalizer: " in caplog.messages[0]


def test_a_lossless_tokenizer_passes_without_a_word(ours: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ours.check(vocab_size=VOCABULARY)
        assert caplog.messages == []
        ours.check(vocab_size=VOCABULARY + 20)
    assert caplog.messages == [
        "data.vocab_size 400 is 20 more than the tokenizer's 380: those rows of the embedding stand for no token"
    ]


def test_an_end_token_that_is_text_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = train_byte_level(tmp_path / "home", eos_token=END)
    load_tokenizer(home).check(vocab_size=VOCABULARY)
    assert caplog.messages == []
    change_json(home / CONFIG, eos_token="e")
    load_tokenizer(home).check(vocab_size=VOCABULARY)
    change_json(home / CONFIG, eos_token=END)
    tokens = json.loads((home / "tokenizer.json").read_text())["added_tokens"]
    change_json(home / "tokenizer.json", added_tokens=[{**token, "special": False} for token in tokens])
    load_tokenizer(home).check(vocab_size=VOCABULARY)
    for end, message in zip(("e", END), caplog.messages, strict=True):
        assert f"gives the token that ends documents for '{end}' in a text too" in message


@pytest.mark.parametrize(
    ("end", "config"),
    [
        (END, {}),
        ("</s>", {}),
        ("<eos>", {"eos_token": None, "bos_token": "<s>"}),
        ("<stop>", {"eos_token": "<stop>"}),
        ("<stop>", {"eos_token": {"content": "<stop>", "lstrip": False}, "chat_template": "{{x}}"}),
    ],
)
def test_the_end_token_is_the_named_or_a_usual_one(tmp_path: Path, end: str, config: dict[str, object]) -> None:
    home = train_byte_level(tmp_path / "home", end=end, **config)
    data = small_data(write_book(tmp_path), tokenizer=str(home), vocab_size=VOCABULARY)
    prepared = prepare_data(data, folder=tmp_path / "data", progress=False)
    assert prepared.end_of_document == load_tokenizer(home / "tokenizer.json").end_of_document == 0
    # the copy is whole, and a copy of it is the same
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (home / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "data" / "tokenizer_config.json").read_text())["eos_token"] == end
    copy = load_tokenizer(tmp_path / "data")
    assert copy.sha256 == prepared.tokenizer_sha256 == load_tokenizer(home).sha256
    assert np.load(tmp_path / "data" / "unigram.npy")[0] == 1
    assert prepare_data(data, folder=tmp_path / "data", progress=False) == prepared
    (home / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    with pytest.raises(InputError, match="is not the one that .* was prepared with|is a different model now"):
        prepare_data(data, folder=tmp_path / "data", progress=False)


def rewrite(**keys: object) -> Callable[[Path], None]:
    return lambda home: change_json(home / "tokenizer.json", **keys)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda home: (home / name).write_text(content) and None


def cut(home: Path) -> None:
    (home / "tokenizer.json").write_bytes((home / "tokenizer.json").read_bytes()[:-100])


def drop_merges(home: Path) -> None:
    model = json.loads((home / "tokenizer.json").read_text())["model"]
    change_json(home / "tokenizer.json", model={**model, "dropout": 0.1})


def add_tokens(home: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing
    tokenizer.post_processor = template(single="<stop> $A", special_tokens=[("<stop>", 0)])
    tokenizer.save(str(home / "tokenizer.json"))


def odd_added_tokens(home: Path) -> None:
    change_json(home / "tokenizer.json", added_tokens=[1])
    change_json(home / CONFIG, eos_token=None)


def no_unknown_token(home: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([("<stop>", 0.0), ("a", -1.0)]))
    tokenizer.save(str(home / "tokenizer.json"))


CONFIG = "tokenizer_config.json"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (
        lambda home: (home / "tokenizer.json").unlink(),
        "tokenizer home is a folder without tokenizer.json",
    ),
    "no JSON": (text("tokenizer.json", "some text"), "tokenizer file home/tokenizer.json is not JSON, or is cut off ("),
    "a list": (text("tokenizer.json", "[]"), "home/tokenizer.json must hold a JSON object: give a tokenizer.json"),
    "a cut file": (cut, "tokenizer file home/tokenizer.json is not JSON, or is cut off (Expecting"),
    "other JSON": (rewrite(model=None), "tokenizer home/tokenizer.json is not a tokenizer.json that tokenizers "),
    "an unknown model": (rewrite(model={"type": "Tiny"}), "home/tokenizer.json is not a tokenizer.json that "),
    "no end token": (
        text(CONFIG, "{}"),
        'write a special token of it into home/tokenizer_config.json, as {"eos_token": "<',
    ),
    "another end": (
        text(CONFIG, '{"eos_token": "</s>"}'),
        "has no token '</s>', the eos_token of the tokenizer_",
    ),
    "a cut config": (text(CONFIG, '{"eos'), "tokenizer file home/tokenizer_config.json is not JSON, or is cut off ("),
    "dropout": (drop_merges, "drops merges at random (dropout 0.1): set dropout to null in a copy of it"),
    "odd added tokens": (odd_added_tokens, "home/tokenizer.json has added_tokens without content: save it again with"),
    "no unknown token": (no_unknown_token, "tokenizer home/tokenizer.json cannot encode every text ("),
    "added tokens": (
        add_tokens,
        "adds special tokens to each text ([0, 65] for 'a' instead of [65]), which training does not: ",
    ),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_refused_in_one_line(trainshort: Call, folder: Path, name: str) -> None:
    break_it, expected = BROKEN[name]
    break_it(train_byte_level(folder / "home", end="<stop>", eos_token="<stop>"))
    write_run(folder, data={"tokenizer": "home", "vocab_size": VOCABULARY})
    assert expected in refused(trainshort, "prepare", "run.yaml")


@pytest.mark.usefixtures("folder")
def test_a_vocabulary_has_a_row_for_each_token(trainshort: Call, folder: Path) -> None:
    train_byte_level(folder / "home")
    write_run(folder, data={"tokenizer": "home", "vocab_size": 379})
    expected = "data.vocab_size must be at least that of data.tokenizer home/tokenizer.json (380), got 379: use 380"
    assert refused(trainshort, "prepare", "run.yaml") == refused(trainshort, "check", "run.yaml") == expected
    (folder / "home" / "tokenizer.json").unlink()
    expected = "note: data.tokenizer home holds neither tokenizer.json nor tokenizer.model: check the path"
    assert expected in trainshort("check", "run.yaml").out


def test_it_goes_with_a_run_from_data_to_export(rank: OneRank, homes: dict[str, Path], tmp_path: Path) -> None:
    more = [f"data.tokenizer={homes['gpt']}", f"data.dir={tmp_path / 'data'}", "data.split=0.1"]
    config = rank.config(tmp_path / "run", *more)
    prepared = prepare_data(config.data, folder=tmp_path / "data", progress=False)
    assert prepared.vocab_size == 400, "20 rows more than tokens"
    OneRank([*rank.overrides, *more], prepared, rank.engine, rank.groups, rank.initial).start(tmp_path / "run", steps=1)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.tokenizer.read_bytes() == (homes["gpt"] / "tokenizer.json").read_bytes()
    assert [verdict.problems for verdict in verify_checkpoints(tmp_path / "run")] == [()]
    model, ours = load(tmp_path / "run"), load_tokenizer(homes["gpt"])
    assert model.encode(BOOK) == ours.encode(BOOK)
    generated = model.generate("Once 日", tokens=30, seed=3)
    assert str(generated) == "Once 日" + ours.decode(generated.token_ids)
    book = write_book(tmp_path)
    report = evaluate(tmp_path / "run", lengths=(8,), protocols=None, data=book)
    assert report["text_sha256"] == hashlib.sha256(book.read_bytes()).hexdigest(), "that of any tokenizer"
    assert report["tokenizer_sha256"] == prepared.tokenizer_sha256
    held_out = evaluate(tmp_path / "run", lengths=(8,), protocols=None, data=None)
    assert held_out["data"]["words"] > 100
    exported = export_checkpoint(tmp_path / "run", format="hf", out=tmp_path / "hf").folder
    assert (exported / "tokenizer.json").read_bytes() == checkpoint.tokenizer.read_bytes()
    read_back = transformers.AutoTokenizer.from_pretrained(exported)
    assert read_back(BOOK)["input_ids"] == ours.encode(BOOK)
    assert (read_back.eos_token_id, read_back.bos_token) == (ours.end_of_document, None)
    with pytest.raises(InputError, match=r"format gguf cannot hold .*tokenizer.json: .*; export to hf"):
        export_checkpoint(tmp_path / "run", format="gguf", out=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
    smaller = rank.config(tmp_path / "run", *more, "data.vocab_size=380")
    told = r"a vocabulary of 400, the run has data\.vocab_size 380: set it to 400, and prepare in another data\.dir"
    for data in (None, replace(prepared, vocab_size=380)):
        with pytest.raises(InputError, match=told):
            check_init_from(tmp_path / "run", config=smaller, prepared=data)
    # the tokenizer is among the checked files
    (checkpoint.path / "tokenizer_config.json").write_bytes(b"{}")
    (broken,) = verify_checkpoints(checkpoint.path)
    assert "tokenizer_config.json has 2 bytes, expected" in broken.problems[0]
