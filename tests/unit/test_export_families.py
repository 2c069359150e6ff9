"""Every family, tied or not, in the formats: the written model has the logits of the formula, far past the length."""

import json
from pathlib import Path

import gguf
import pytest
import torch

from configs.errors import InputError
from configs.schema import Model
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import random_weights, train_sentencepiece, write_export
from training.export.formats.gguf import GgufFormat
from training.export.formats.huggingface import HuggingFaceFormat
from training.export.formats.table import chain_export_options, export_problems
from training.families.table import shards_of

LENGTH = 32
MPT = Model(layers=2, hidden=96, heads=6, family="mpt")
MODELS = {
    "bloom-untied": MPT.model_copy(update={"family": "bloom", "tie_embeddings": False}),
    "mpt": MPT,
    "mpt-untied": MPT.model_copy(update={"tie_embeddings": False}),
}
JAIS = MPT.model_copy(update={"family": "jais"})
STEEP = MPT.model_copy(update={"alibi_bias_max": 16})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


def written_logits(
    folder: Path, form: GgufFormat | HuggingFaceFormat, model: Model, *, tokenizer: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a model to a new folder; return the logits that the format reads from it, and the formula's."""
    weights = random_weights(model, vocab_size=len(read_vocabulary(tokenizer)))
    folder.mkdir()
    form.check(model)
    write_export(form, folder, weights=weights, model=model, tokenizer=tokenizer, sequence_length=LENGTH, longest=40)
    tokens = torch.randint(400, (1, 4 * LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        read = form.read_logits(folder)(tokens)
    exact = {name: weight.double() for name, weight in weights.items()}
    shape = {"layers": model.layers, "heads": model.heads, "bias_max": model.alibi_bias_max}
    return read, bloom_logits(exact, tokens, **shape).float()


@pytest.mark.parametrize("name", MODELS)
def test_both_formats_have_the_logits_of_the_formula(tmp_path: Path, tokenizer: Path, name: str) -> None:
    model = MODELS[name]
    hf, expected = written_logits(tmp_path / "hf", HuggingFaceFormat(), model, tokenizer=tokenizer)
    torch.testing.assert_close(hf, expected, atol=1e-4, rtol=0)
    in_gguf, _ = written_logits(tmp_path / "gguf", GgufFormat("f32"), model, tokenizer=tokenizer)
    assert torch.equal(in_gguf, hf)
    assert float(expected.abs().max()) > 3
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["tie_word_embeddings"] is model.tie_embeddings
    assert (config["train_length"], config["seq_length"]) == (LENGTH, 40)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_gguf_has_the_logits_of_a_jais(tmp_path: Path, tokenizer: Path, ties: bool, dtype: str) -> None:
    # the square root of a head's width is no power of two, so scaled queries round to other numbers
    model = JAIS.model_copy(update={"heads": 12, "tie_embeddings": ties, "alibi_bias_max": 10})
    form = GgufFormat(dtype)
    read, _ = written_logits(tmp_path / "gguf", form, model, tokenizer=tokenizer)
    weights = random_weights(model, vocab_size=len(read_vocabulary(tokenizer)))
    shards = shards_of(model, vocab_size=len(read_vocabulary(tokenizer)))
    rounded = {name: form.rounded(weight, shards[name], model=model) for name, weight in weights.items()}
    tokens = torch.randint(400, (1, 4 * LENGTH), generator=torch.Generator().manual_seed(1))
    exact = {name: weight.double() for name, weight in rounded.items()}
    expected = bloom_logits(exact, tokens, layers=model.layers, heads=model.heads, bias_max=10).float()
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=0)
    assert float(expected.abs().max()) > 3
    changed = {name for name in weights if not torch.equal(rounded[name], weights[name])}
    assert changed == ({name for name in weights if weights[name].ndim == 2} if dtype != "f32" else set()) | {
        name for name in changed if "query_key_value.weight" in name
    }


def test_transformers_has_no_class_for_jais() -> None:
    assert export_problems(JAIS) == {
        "hf": "transformers has no class for model.family jais (it has bloom, mpt): export with --format gguf or "
        "--format hf --with-code"
    }
    assert chain_export_options(JAIS) == ["--format", "hf", "--with-code"]
    narrow = JAIS.model_copy(update={"feed_forward": 80})
    with pytest.raises(InputError, match=r"rows of a multiple of 32, and model\.feed_forward is 80: export in f16"):
        GgufFormat("q8_0").check(narrow)


def test_mpt_takes_longer_texts_than_it_was_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    written_logits(tmp_path / "hf", HuggingFaceFormat("bf16"), MPT, tokenizer=tokenizer)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["max_seq_len"] == 4 * LENGTH  # which transformers' Mpt cannot exceed
    assert (config["architectures"], config["no_bias"], config["learned_pos_emb"]) == (["MptForCausalLM"], True, False)
    assert config["attn_config"]["alibi_bias_max"] == 8


def test_gguf_holds_mpts_other_slopes(tmp_path: Path, tokenizer: Path) -> None:
    read, expected = written_logits(tmp_path / "gguf", GgufFormat("f32"), STEEP, tokenizer=tokenizer)
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=0)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "mpt"
    assert fields["mpt.attention.max_alibi_bias"].contents() == 16.0
    # transformers' Mpt would compute with 8, and llama.cpp's bloom too
    assert export_problems(STEEP).keys() == {"hf"}
    assert export_problems(STEEP)["hf"].endswith(": export with --format gguf or --format hf --with-code")
    with pytest.raises(InputError, match=r"MPT cannot hold model\.alibi_bias_max 16 \(it holds 8\)"):
        HuggingFaceFormat().check(STEEP)
    neither = export_problems(STEEP.model_copy(update={"family": "bloom"}))
    assert neither.keys() == {"hf", "gguf"}
    assert all(problem.endswith(": export with --format hf --with-code") for problem in neither.values())
