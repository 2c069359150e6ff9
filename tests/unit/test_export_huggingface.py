"""Export a folder, load it with transformers, and compare it with arithmetic by hand."""

import dataclasses
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, TrainshortError
from configs.schema import Model
from data_pipeline.vocabulary import PieceType, read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import HARD_WORDS, SHAPE, random_weights, train_sentencepiece, write_export
from training.export.folder import new_folder
from training.export.formats.huggingface import HuggingFaceFormat, generate_text
from training.export.parity import EDGE_CASE_TEXTS, LogitParity, compare_logits, compare_tokenizers

FORMAT = HuggingFaceFormat()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vocab_size(tokenizer: Path) -> int:
    return len(read_vocabulary(tokenizer))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, vocab_size: int) -> Path:
    out = tmp_path_factory.mktemp("export") / "deeper" / "hf"
    write(out, tokenizer=tokenizer, vocab_size=vocab_size)
    return out


def write(
    out: Path,
    *,
    tokenizer: Path,
    vocab_size: int,
    model: Model = SHAPE,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    FORMAT.check(model)
    with new_folder(out) as folder:
        FORMAT.write(
            folder,
            name="small",
            weights=weights or random_weights(SHAPE, vocab_size=vocab_size),
            model=model,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            sequence_length=32,
            longest=96,
        )


def by_hand(tokens: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    return bloom_logits(weights, tokens, layers=SHAPE.layers, heads=SHAPE.heads)


def compare_with_formula(folder: Path, *, vocab_size: int, lengths: tuple[int, ...], error: float = 0.0) -> LogitParity:
    """Compare a folder's logits with the formula's; add an error to one logit of the first length."""

    def formula(batch: torch.Tensor) -> torch.Tensor:
        logits = by_hand(batch, vocab_size=vocab_size)
        if batch.shape[1] == lengths[0]:
            logits[0, 7, 3] += error
        return logits

    tokens = torch.randint(vocab_size, (lengths[-1],), generator=torch.Generator().manual_seed(1))
    expected = [formula(tokens[None, :length]) for length in lengths]
    return compare_logits(expected, exported=FORMAT.read_logits(folder), tokens=tokens)


def test_transformers_computes_the_logits_of_the_formula(exported: Path, vocab_size: int) -> None:
    parity = compare_with_formula(exported, vocab_size=vocab_size, lengths=(32, 128))
    assert parity.lengths == (32, 128)
    assert parity.difference < parity.tolerance
    assert parity.scale > 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        parity.difference = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("error", [0.05, float("nan")])
def test_logits_that_differ_are_refused(exported: Path, vocab_size: int, error: float) -> None:
    with pytest.raises(TrainshortError, match=r"differ from the trained model's by (0\.05|nan) at lengths 16, 32"):
        compare_with_formula(exported, vocab_size=vocab_size, lengths=(16, 32), error=error)


def test_tokenizer_gives_the_ids_and_text_of_sentencepiece(exported: Path, tokenizer: Path) -> None:
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    theirs = transformers.AutoTokenizer.from_pretrained(exported)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(HARD_WORDS, max_size=12).map("".join))
    def same(text: str) -> None:
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
        assert theirs.decode(ids) == text.replace("\u2581", " ")

    for text in EDGE_CASE_TEXTS:
        same.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    same()
    assert len(theirs) == ours.get_piece_size()
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert "<s>" in EDGE_CASE_TEXTS
    assert theirs("<s>")["input_ids"] == [1]


def test_folder_holds_what_engines_read(exported: Path, tokenizer: Path, vocab_size: int) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    expected = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 48,
        "n_layer": 2,
        "n_head": 6,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "seq_length": 96,
        "train_length": 32,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    with safetensors.safe_open(exported / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.metadata() == {"format": "pt"}
    assert "lm_head.weight" not in names
    assert all(name.startswith("transformer.") for name in names)
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((exported / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not [path for path in exported.parent.iterdir() if path != exported]


class Weights(Mapping[str, torch.Tensor]):
    """Weights read from a file: new tensors at each access. `most_bytes` of them were in memory at once."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights, self._read = weights, list[weakref.ref[torch.Tensor]]()
        self.most_bytes = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name].clone()
        self._read.append(weakref.ref(weight))
        alive = [tensor for reference in self._read if (tensor := reference()) is not None]
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in alive))
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def test_files_of_weights_are_written_one_at_a_time(
    exported: Path, tokenizer: Path, vocab_size: int, tmp_path: Path
) -> None:
    limit = 80_000  # the embedding, 77 kB, fits
    lazy = Weights(random_weights(SHAPE, vocab_size=vocab_size))
    form = HuggingFaceFormat(shard_bytes=limit)
    write_export(form, tmp_path, weights=lazy, model=SHAPE, tokenizer=tokenizer)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(file.stat().st_size for file in files) / 2 < lazy.most_bytes <= limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"] == {"total_size": sum(weight.nbytes for weight in lazy.values())}
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(form.read_logits(tmp_path)(tokens), FORMAT.read_logits(exported)(tokens))


def test_generated_text_is_the_greedy_text_of_the_formula(exported: Path, tokenizer: Path, vocab_size: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = processor.encode("The quick")
    for _ in range(6):
        ids.append(int(by_hand(torch.tensor([ids]), vocab_size=vocab_size)[0, -1].argmax()))
    assert 2 not in ids
    assert generate_text(exported, prompt="The quick", tokens=6) == processor.decode(ids)


def test_generation_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no exported model"):
        generate_text(tmp_path, prompt="x", tokens=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"position": "sinusoidal"}, r"model\.position sinusoidal \(it holds alibi\): export with .* --with-code"),
        ({"position": "kerple"}, r"model\.position kerple \(it holds alibi\): no other format can hold it"),
        ({"feed_forward": 100}, r"model\.feed_forward 100 \(it holds 4 x hidden, 192\)"),
        ({"window": 128}, r"model\.window 128 \(it holds null, all tokens\): export with --format hf --with-code"),
        ({"alibi_bias_max": 16}, r"model\.alibi_bias_max 16 \(it holds 8\)"),
        ({"feed_forward": 9, "position": "none"}, r"model\.position none .*; model\.feed_forward 9"),
    ],
)
def test_model_that_bloom_cannot_hold_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"BLOOM cannot hold {message}"):
        FORMAT.check(SHAPE.model_copy(update=changed))


def test_taken_paths_are_refused_and_left_as_they_are(tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "mine.txt").write_text("kept")
    file.write_text("kept")
    with pytest.raises(InputError, match="full has files in it"):
        write(full, tokenizer=tokenizer, vocab_size=vocab_size)
    with pytest.raises(InputError, match="file is a file"):
        write(file, tokenizer=tokenizer, vocab_size=vocab_size)
    with pytest.raises(InputError, match="cannot write beside"):
        write(file / "hf", tokenizer=tokenizer, vocab_size=vocab_size)
    assert sorted(tmp_path.rglob("*")) == sorted([empty, file, full, full / "mine.txt"])
    write(empty, tokenizer=tokenizer, vocab_size=vocab_size)
    assert (empty / "config.json").is_file()


def test_weights_that_do_not_fit_are_refused(tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    del weights["blocks.1.attention_norm.bias"]
    with pytest.raises(AssertionError, match=r"h\.1\.input_layernorm\.bias"):
        write(tmp_path / "out", tokenizer=tokenizer, vocab_size=vocab_size, weights=weights)


def test_unknown_parameters_are_refused(tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
    for name in ("blocks.0.rotary.weight", "embedding.position.weight", "blocks.2.final_norm.bias"):
        weights = random_weights(SHAPE, vocab_size=vocab_size) | {name: torch.zeros(1)}
        with pytest.raises(KeyError, match=name):
            write(tmp_path / "out", tokenizer=tokenizer, vocab_size=vocab_size, weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model type unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization nmt_nfkc"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"byte_fallback": False}, "no byte_fallback"),
    ],
)
def test_tokenizer_that_is_not_portable_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        read_vocabulary(model)


def test_file_that_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, content in {"text": b"not a tokenizer at all", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} (is not a sentencepiece model|has no pieces)"):
            read_vocabulary(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_vocabulary(tmp_path / "missing")


def test_pieces_are_those_sentencepiece_reports(tokenizer: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    vocabulary = read_vocabulary(tokenizer)
    assert (vocabulary.unknown_id, vocabulary.begin_id, vocabulary.end_id, vocabulary.pad_id) == (0, 1, 2, None)
    for number, piece in enumerate(vocabulary.pieces):
        assert piece.text == processor.id_to_piece(number)
        assert piece.score == processor.get_score(number)
        assert (piece.type is PieceType.BYTE) == processor.is_byte(number)
        assert (piece.type is PieceType.CONTROL) == processor.is_control(number)


def test_control_and_user_defined_pieces_keep_their_ids(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, user_defined_symbols=["<|user|>", "\t"], control_symbols=["<ctl>"], pad_id=3)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    write(tmp_path / "hf", tokenizer=model, vocab_size=processor.get_piece_size())
    exported = FORMAT.read_tokenizer(tmp_path / "hf")
    texts = [*EDGE_CASE_TEXTS, "a<|user|>\tb<ctl> c"]
    assert compare_tokenizers(processor, exported=exported, texts=texts) > 60


def test_other_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    other = train_sentencepiece(tmp_path, vocab_size=340)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(other))
    with pytest.raises(TrainshortError, match="gives other ids for 'The quick"):
        compare_tokenizers(processor, exported=FORMAT.read_tokenizer(exported), texts=["The quick brown fox"])


def test_length_limit_keeps_attention_scores_within_2_gb() -> None:
    assert FORMAT.length_limit(Model(layers=1, hidden=1024, heads=16)).tokens >= 4096
    longest = FORMAT.length_limit(Model(layers=1, hidden=14336, heads=112)).tokens
    assert longest < 8192
    assert 112 * longest**2 * 4 <= 2_000_000_000 < 112 * (longest + 1) ** 2 * 4
