"""The export command: the order of its checks, what it compares, and what a failed export leaves behind."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InputError, TrainshortError
from configs.load import check_run
from configs.schema import Model
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import SHAPE, random_weights, train_sentencepiece
from training.evaluation.text import EvaluationText
from training.export.formats.huggingface import HuggingFaceFormat
from training.export.formats.table import CHAIN_FORMAT, FORMATS, LengthLimit, load_format
from training.export.run import export_checkpoint

SENTENCE = "The quick brown fox jumps over the lazy dog.\n" * 40


class FormulaModel:
    """The model of the checkpoint, computed by formula; `error` is added to its logits."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.certificate = {"position": "alibi"}
        self.error = 0.0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return bloom_logits(self.weights, tokens, layers=SHAPE.layers, heads=SHAPE.heads) + self.error


@pytest.fixture
def model(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> FormulaModel:
    """Let export open a checkpoint of random weights, trained at 32 tokens."""
    tokenizer = train_sentencepiece(tmp_path)
    vocab_size = len(read_vocabulary(tokenizer))
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    run_values["model"] = SHAPE.model_dump()
    run_values["parallel"] = {}
    checkpoint = SimpleNamespace(
        config=check_run(run_values, name="small"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        weights=lambda: weights,
        run_dir=tmp_path / "no run",
    )
    tokens = np.array(Tokenizer.load(tokenizer).encode(SENTENCE), dtype=np.int64)
    model = FormulaModel(weights)
    monkeypatch.setattr("training.export.run.open_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr("training.export.run.held_out_text", lambda _: EvaluationText("held-out", tokens, None, None))
    monkeypatch.setattr("training.export.run.load_single", lambda _: model)
    return model


@pytest.mark.usefixtures("model")
def test_logits_are_compared_at_one_and_four_training_lengths(tmp_path: Path) -> None:
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert exported.folder == tmp_path / "export" / "hf"
    assert exported.logits.lengths == (32, 128)
    assert exported.logits.difference <= exported.logits.tolerance
    assert exported.held_out
    assert "at lengths 32 and 128 logits differ by" in str(exported)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf"]


def test_model_that_differs_is_not_exported(model: FormulaModel, tmp_path: Path) -> None:
    model.error = 0.01
    with pytest.raises(TrainshortError, match=r"differ from the trained model's by 0\.01"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.usefixtures("model")
def test_without_data_random_tokens_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_prepared(checkpoint: object) -> EvaluationText:
        raise InputError("data is not prepared")

    monkeypatch.setattr("training.export.run.held_out_text", not_prepared)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert not exported.held_out
    assert "on random tokens" in str(exported)


@pytest.mark.usefixtures("model")
def test_length_limit_shortens_the_comparison_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length_limit = HuggingFaceFormat.length_limit

    def limit_of_50(exporter: HuggingFaceFormat, model: Model) -> LengthLimit:
        return dataclasses.replace(length_limit(exporter, model), tokens=50)

    monkeypatch.setattr(HuggingFaceFormat, "length_limit", limit_of_50)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert exported.logits.lengths == (32, 50)
    assert "at lengths 32 and 50 (not 128: transformers' attention scores would take over 2 GB)" in str(exported)


@pytest.mark.parametrize("changed", [{"position": "sinusoidal"}, {"feed_forward": 100}])
def test_model_that_the_format_cannot_hold_writes_nothing(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    run_values["model"] = {**SHAPE.model_dump(), **changed}
    run_values["parallel"] = {}
    checkpoint = SimpleNamespace(config=check_run(run_values, name="small"))
    monkeypatch.setattr("training.export.run.open_checkpoint", lambda path: checkpoint)
    (key,) = changed
    with pytest.raises(InputError, match=f"the Hugging Face Bloom format cannot hold model.{key}"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "out" / "hf")
    assert not (tmp_path / "out").exists()


def test_every_format_of_the_table_loads() -> None:
    assert CHAIN_FORMAT in FORMATS
    for name in FORMATS:
        load_format(name).check(SHAPE)


def test_formats_outside_the_table_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("gguf", "format gguf is not available in this version: use hf"),
        ("onnx", "format 'onnx' is not known: use hf"),
    ):
        with pytest.raises(InputError, match=message):
            export_checkpoint(tmp_path, format=name, out=tmp_path / "out")


def test_taken_folder_is_refused_before_a_checkpoint_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="has files in it"):
        export_checkpoint(tmp_path / "no checkpoint", format="hf", out=out)
