"""Export a GGUF file, read it back with transformers and sentencepiece, and compare it with arithmetic by hand."""

from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Model
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import random_weights, train_sentencepiece, write_export
from training.export.formats.gguf import GgufFormat
from training.export.formats.huggingface import HuggingFaceFormat
from training.export.formats.table import ExportFormat
from training.families.table import shards_of

SHAPE = Model(layers=2, hidden=96, heads=6)  # slopes between two powers of two; rows for q8_0
UNUSED = 3  # rows of the embedding that no piece has


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), user_defined_symbols=["\n", "<|user|>"])


@pytest.fixture(scope="module")
def weights(tokenizer: Path) -> dict[str, torch.Tensor]:
    return random_weights(SHAPE, vocab_size=len(read_vocabulary(tokenizer)) + UNUSED)


def write(form: ExportFormat, folder: Path, *, weights: dict[str, torch.Tensor], tokenizer: Path) -> Path:
    return write_export(form, folder, weights=weights, model=SHAPE, tokenizer=tokenizer)


def tokens_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = len(weights["embedding.word.weight"])
    return torch.randint(rows, (1, 128), generator=torch.Generator().manual_seed(1))


def test_transformers_reads_the_logits_of_its_own_format(
    tmp_path: Path, tokenizer: Path, weights: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    read = []
    for form in (HuggingFaceFormat(), GgufFormat("f32")):
        folder = tmp_path / type(form).__name__
        folder.mkdir()
        read.append(form.read_logits(write(form, folder, weights=weights, tokenizer=tokenizer)))
    with torch.no_grad():
        theirs, ours = (logits(tokens_of(weights)) for logits in read)
    assert torch.equal(ours, theirs)
    assert float(ours.abs().max()) > 3
    assert capfd.readouterr().err == "", "a bar is no result, warning or error"


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_file_has_the_logits_of_the_rounded_weights(
    tmp_path: Path, tokenizer: Path, weights: dict[str, torch.Tensor], dtype: str
) -> None:
    form = GgufFormat(dtype)
    form.check(SHAPE)
    exported = form.read_logits(write(form, tmp_path, weights=weights, tokenizer=tokenizer))
    shards = shards_of(SHAPE, vocab_size=len(weights["embedding.word.weight"]))
    rounded = {name: form.rounded(weight, shards[name], model=SHAPE) for name, weight in weights.items()}
    assert all(
        torch.equal(rounded[name], weights[name]) == (dtype == "f32" or weights[name].ndim == 1) for name in rounded
    )
    with torch.no_grad():
        found = exported(tokens_of(weights))
    expected = bloom_logits(rounded, tokens_of(weights), layers=SHAPE.layers, heads=SHAPE.heads)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    (file,) = tmp_path.glob("*.gguf")
    assert file.stat().st_size == pytest.approx(
        form.bytes_per_weight * sum(weight.numel() for weight in weights.values()), rel=0.2
    )


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, weights: dict[str, torch.Tensor]) -> Tokenizer:
    form = GgufFormat("f16")
    return form.read_tokenizer(write(form, tmp_path_factory.mktemp("gguf"), weights=weights, tokenizer=tokenizer))


def test_the_tokenizer_gives_the_ids_and_text_of_sentencepiece(read_back: Tokenizer, tokenizer: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    @given(st.text(st.characters(codec="utf-8"), max_size=80) | st.text("ab \n\t<|user|>", max_size=80))
    def same(text: str) -> None:
        ids = theirs.encode(text)
        assert read_back.encode(text) == ids
        assert read_back.decode(ids) == theirs.decode(ids)

    for text in (*EDGE_CASE_TEXTS, "a<|user|>b\n\n <|user|>"):
        same.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    same()


def test_the_fields_are_those_of_llama_cpp(tmp_path: Path, tokenizer: Path, weights: dict[str, torch.Tensor]) -> None:
    form = GgufFormat("f16")
    write(form, tmp_path, weights=weights, tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model-F16.gguf")
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    expected = {
        "general.architecture": "bloom",
        "general.name": "my run",
        "general.file_type": 1,
        "bloom.context_length": 96,
        "trainshort.train_length": 32,
        "bloom.embedding_length": 96,
        "bloom.feed_forward_length": 384,
        "bloom.block_count": 2,
        "bloom.attention.head_count": 6,
        "bloom.attention.head_count_kv": 6,
        "bloom.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "bloom.vocab_size": len(weights["embedding.word.weight"]),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{name}": False for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    lists = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    assert found.keys() == expected.keys() | lists
    assert {name: found[name] for name in expected} == expected
    assert found["tokenizer.ggml.tokens"][-UNUSED:] == [
        f"[unused {len(found['tokenizer.ggml.tokens']) - n}]" for n in (3, 2, 1)
    ]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_qkv.bias"], kinds["output_norm.weight"]) == (
        "F16",
        "F32",
        "F32",
    )


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match="q8_0 needs rows of a multiple of 32, and model.hidden is 48: export in f16"):
        GgufFormat("q8_0").check(Model(layers=2, hidden=48, heads=6))
    with pytest.raises(InputError, match="BLOOM cannot hold model.position rotary"):
        GgufFormat("f32").check(Model(layers=2, hidden=96, heads=6, position="rotary"))
    taken = train_sentencepiece(tmp_path, user_defined_symbols=["<|im_end|>"])
    with pytest.raises(InputError, match=r"symbol '<\|im_end\|>', which llama.cpp takes for a control token"):
        write(GgufFormat("f32"), tmp_path, weights=weights, tokenizer=taken)
    few = {"embedding.word.weight": torch.zeros(10, 96)}
    with pytest.raises(InputError, match="pieces, the model's embedding 10 rows"):
        write(GgufFormat("f32"), tmp_path, weights=few, tokenizer=taken)
    assert not list(tmp_path.glob("*.gguf"))
