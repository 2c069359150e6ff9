"""An exported folder in vLLM itself, which has an environment of its own: `make test-vllm VLLM_PYTHON=...`."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Model
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import random_weights, train_sentencepiece, write_export
from tests.support.formula_model import open_formula_model
from training.export.formats.huggingface import HuggingFaceFormat
from training.export.run import export_checkpoint

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("log_probabilities.py")
LENGTH, TOKENS = 512, 2500
SHAPE = Model(layers=2, hidden=384, heads=12)  # vLLM's attention on a CPU needs heads of 32 or more
# One process, a gibibyte for keys and values, no core taken, nothing asked of the network.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def vllm_python() -> str:
    return str(Path(os.environ["VLLM_PYTHON"]).absolute())


def test_log_probabilities_far_past_the_training_length(tmp_path: Path, vllm_python: str) -> None:
    tokenizer = train_sentencepiece(tmp_path)
    weights = random_weights(SHAPE, vocab_size=len(read_vocabulary(tokenizer)))
    folder, prompt, written = (tmp_path / name for name in ("exported", "prompt.json", "found.json"))
    folder.mkdir()
    lengths = {"sequence_length": LENGTH, "longest": 8 * LENGTH}
    write_export(HuggingFaceFormat("fp32"), folder, weights=weights, model=SHAPE, tokenizer=tokenizer, **lengths)
    tokens = torch.randint(3, len(weights["embedding.word.weight"]), (1, TOKENS))
    prompt.write_text(json.dumps(tokens[0].tolist()))
    command = [vllm_python, "-I", str(SCRIPT), str(folder), str(prompt), str(written)]
    subprocess.run(command, env={**os.environ, **SETTINGS}, check=True, timeout=900)
    found = json.loads(written.read_text())
    exact = {name: weight.double() for name, weight in weights.items()}
    expected = bloom_logits(exact, tokens, layers=SHAPE.layers, heads=SHAPE.heads)[0].log_softmax(-1)
    assert len(found) == TOKENS - 1
    assert all(str(token) in place for token, place in zip(tokens[0, 1:].tolist(), found, strict=True))
    differences = [
        abs(value - expected[i, int(token)]) for i, place in enumerate(found) for token, value in place.items()
    ]
    assert len(differences) >= 20 * len(found)
    assert max(differences) < 0.01


def test_an_export_is_checked_with_the_server(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, vllm_python: str
) -> None:
    program = tmp_path / "vllm"  # that of vllm-cpu does not start
    program.write_text(f'#!/bin/sh\nshift\nexec {vllm_python} -I -m vllm.entrypoints.openai.api_server --model "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    open_formula_model(tmp_path, run_values, monkeypatch, shape=SHAPE)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "out", serve_check=True)
    assert exported.served is not None
    assert exported.served.server == "vLLM"
    assert exported.served.tokens == exported.served.asked == 16
