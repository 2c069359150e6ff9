"""What an export is verified with, what its card says of that, and what becomes of an export that fails."""

import json
import weakref
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import TrainshortError
from tests.support.formula_model import FormulaModel, open_formula_model
from training.export.formats.huggingface import HuggingFaceFormat, TransformersModel
from training.export.parity import Continuation, compare_continuations
from training.export.run import export_checkpoint


@pytest.fixture
def model(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> FormulaModel:
    """Let export open a checkpoint of random weights, trained at 32 tokens."""
    return open_formula_model(tmp_path, run_values, monkeypatch)


def test_the_trained_model_is_freed_before_the_other_is_loaded(
    model: FormulaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, models = HuggingFaceFormat.read_logits, list[weakref.ref[FormulaModel]]()

    def load(_: object) -> FormulaModel:
        loaded = FormulaModel(model.weights)
        models.append(weakref.ref(loaded))
        return loaded

    def read_alone(exporter: HuggingFaceFormat, folder: Path) -> TransformersModel:
        assert [reference() for reference in models] == [None]
        return read(exporter, folder)

    monkeypatch.setattr("training.export.trained.load_single", load)
    monkeypatch.setattr(HuggingFaceFormat, "read_logits", read_alone)
    assert export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf").continued == 16


@pytest.mark.usefixtures("model")
def test_a_greedy_text_that_differs_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_: TransformersModel, ids: object, **__: object) -> list[int]:
        return [3] * 16

    monkeypatch.setattr(TransformersModel, "continue_greedily", other)
    with pytest.raises(TrainshortError, match=r"continues a text with the tokens \[3\], the trained model with"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_tokens_that_are_as_likely_may_follow_either_way() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [4.0, 3.999, 0.0], [9.0, 0.0, 0.0]])
    expected = Continuation("a", (1,), (1, 0, 0), logits)
    for ids, equal in (([1, 0, 0], 3), ([1, 1, 2], 1)):
        assert compare_continuations(expected, ids, tolerance=0.01) == equal
    for wrong, tolerance in (([1, 1, 2], 1e-4), ([1, 2], 0.01), ([1, 0], 0.01), ([1, 0, 0, 0], 0.01), ([2], 0.01)):
        with pytest.raises(TrainshortError, match="the exported model continues a text with the tokens"):
            compare_continuations(expected, wrong, tolerance=tolerance)


@pytest.mark.usefixtures("model")
def test_the_card_says_what_was_exported_and_verified(tmp_path: Path) -> None:
    for name, dtype, file, runtimes in (
        ("hf", "fp32", "model.safetensors", {"transformers", "vLLM"}),
        ("gguf", "f16", "model-F16.gguf", {"llama.cpp", "llama-cpp-python", "transformers"}),
    ):
        out = export_checkpoint(tmp_path, format=name, out=tmp_path / name, dtype=dtype).folder
        card = json.loads((out / "export.json").read_text())
        assert (card["format_version"], card["format"], card["precision"]["weights"]) == (1, name, dtype)
        hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
        del hashes["export.json"]
        assert {path: entry["sha256"] for path, entry in card["files"].items()} == hashes
        assert card["origin"]["tokenizer_sha256"] == sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
        assert card["architecture"]["slopes"] == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
        assert card["architecture"]["model"]["heads"] == 6
        assert card["verified"]["lengths"] == [32, 128]
        assert card["verified"]["greedy_tokens"] == 16
        assert (card["verified"]["rounding"] is None) == (dtype == "fp32")
        assert card["verified"]["versions"]["transformers"] == version("transformers")
        assert (card["lengths"]["trained"], card["lengths"]["usable"]) == (32, 32)
        assert {each["runtime"] for each in card["serving"]} == runtimes
        text = (out / "EXPORT.md").read_text()
        assert all(each["command"] in text for each in card["serving"])
        assert f"| {file} | {(out / file).stat().st_size:,} | {hashes[file]} |" in text
        assert "TransformerEngine, cuDNN, FlashInfer" in text
        assert "[EXPORT.md](EXPORT.md)" in (out / "README.md").read_text()
