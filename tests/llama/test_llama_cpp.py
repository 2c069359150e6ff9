"""GGUF files in llama.cpp itself: `make test-llama`, which builds llama-cpp-python (ten minutes on two cores)."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import Model
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import HARD_WORDS, random_weights, train_sentencepiece, write_export
from tests.support.formula_model import open_formula_model
from training.export.formats.gguf import GgufFormat
from training.export.run import export_checkpoint

pytestmark = pytest.mark.llama
LENGTH, TOKENS = 512, 2500
SHAPES = {
    "bloom-8": Model(layers=2, hidden=128, heads=8),
    "bloom-12": Model(layers=2, hidden=192, heads=12),
    "bloom-8-untied": Model(layers=2, hidden=128, heads=8, tie_embeddings=False),
    "mpt-8": Model(layers=2, hidden=128, heads=8, family="mpt", alibi_bias_max=12),
    "mpt-12-untied": Model(layers=2, hidden=192, heads=12, family="mpt", tie_embeddings=False),
    "jais-8": Model(layers=2, hidden=256, heads=8, family="jais", alibi_bias_max=10),
    "jais-12-untied": Model(layers=2, hidden=192, heads=12, family="jais", tie_embeddings=False),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), user_defined_symbols=["\n", "<|user|>"])


def load(folder: Path, *, tokenizer: Path, shape: Model, dtype: str, weights: dict[str, Tensor]) -> Any:
    """Write a file and return it as llama.cpp loads it, with fp32 keys and values."""
    import llama_cpp

    lengths = {"sequence_length": LENGTH, "longest": 4 * LENGTH}
    write_export(GgufFormat(dtype), folder, weights=weights, model=shape, tokenizer=tokenizer, **lengths)
    (file,) = folder.glob("*.gguf")
    fp32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(file), n_ctx=4096, n_batch=4096, logits_all=True, type_k=fp32, type_v=fp32, verbose=False
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_logits_far_past_the_training_length(tmp_path: Path, tokenizer: Path, name: str, dtype: str) -> None:
    shape = SHAPES[name]
    weights = random_weights(shape, vocab_size=len(read_vocabulary(tokenizer)))
    llama = load(tmp_path, tokenizer=tokenizer, shape=shape, dtype=dtype, weights=weights)
    tokens = torch.randint(3, len(weights["embedding.word.weight"]), (1, TOKENS))
    llama.eval(tokens[0].tolist())
    found = torch.from_numpy(np.array(llama.scores[:TOKENS], dtype=np.float64))
    exact = {name: weight.double() for name, weight in weights.items()}
    slopes = {"heads": shape.heads, "bias_max": shape.alibi_bias_max}
    expected = bloom_logits(exact, tokens, layers=shape.layers, **slopes)[0]
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    difference = float((found - expected).abs().max())
    assert difference < {"f32": 0.02, "f16": 0.05, "q8_0": np.inf}[dtype]
    assert divergence < 0.01


def test_tokens_are_those_of_sentencepiece(tmp_path: Path, tokenizer: Path) -> None:
    shape = SHAPES["mpt-8"]
    weights = random_weights(shape, vocab_size=len(read_vocabulary(tokenizer)))
    llama = load(tmp_path, tokenizer=tokenizer, shape=shape, dtype="f16", weights=weights)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    @settings(max_examples=500, deadline=None)
    @given(st.lists(HARD_WORDS, max_size=12).map("".join))
    def same(text: str) -> None:
        ids = theirs.encode(text)
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert llama.detokenize(ids).decode() == theirs.decode(ids)

    for text in (*EDGE_CASE_TEXTS, "a<|user|>b\n\n <|user|>"):
        same.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    same()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_an_export_is_checked_with_the_server(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    open_formula_model(tmp_path, run_values, monkeypatch)
    exported = export_checkpoint(tmp_path, format="gguf", dtype=dtype, out=tmp_path / "out", serve_check=True)
    assert exported.served is not None
    assert (exported.served.server, exported.served.version) == ("llama-cpp-python", version("llama-cpp-python"))
    assert exported.served.tokens == exported.served.asked == 16


def test_greedy_text_is_that_of_the_formula(tmp_path: Path, tokenizer: Path) -> None:
    shape = SHAPES["bloom-12"]
    weights = random_weights(shape, vocab_size=len(read_vocabulary(tokenizer)))
    llama = load(tmp_path, tokenizer=tokenizer, shape=shape, dtype="f32", weights=weights)
    prompt = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode("The quick brown fox")
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(bloom_logits(weights, torch.tensor([ids]), layers=shape.layers, heads=12)[0, -1].argmax()))
    stream = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in range(20)] == ids[len(prompt) :]
