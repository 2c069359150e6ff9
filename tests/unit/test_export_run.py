"""The command's own part of an export: what is compared, and what is left behind when it fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InputError, TrainshortError
from configs.load import check_run
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.vocabulary import read_vocabulary
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import SHAPE, random_weights, train_sentencepiece
from training.evaluation.text import EvaluationText
from training.export import run as exporting
from training.export.run import export_checkpoint

SENTENCE = "The quick brown fox jumps over the lazy dog.\n" * 40


class ByHand:
    """The model of the checkpoint, with an error to order."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.certificate = {"position": "alibi"}
        self.wrong = 0.0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return bloom_logits(self.weights, tokens, layers=SHAPE.layers, heads=SHAPE.heads) + self.wrong


@pytest.fixture
def model(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ByHand:
    """Make export find a checkpoint of random weights, trained at 32 tokens."""
    tokenizer = train_sentencepiece(tmp_path)
    vocab_size = len(read_vocabulary(tokenizer))
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    run_values["model"] = SHAPE.model_dump()
    run_values["parallel"] = {}
    found = SimpleNamespace(
        config=check_run(run_values, name="small"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        weights=lambda: weights,
        run_dir=tmp_path / "no run",
    )
    tokens = np.array(Tokenizer.load(tokenizer).encode(SENTENCE), dtype=np.int64)
    by_hand = ByHand(weights)
    monkeypatch.setattr(exporting, "open_checkpoint", lambda path: found)
    monkeypatch.setattr(exporting, "held_out_text", lambda checkpoint: EvaluationText("held-out", tokens, None, None))
    monkeypatch.setattr(exporting, "load_single", lambda checkpoint: by_hand)
    return by_hand


@pytest.mark.usefixtures("model")
def test_export_compares_logits_at_the_training_length_and_four_times_it(tmp_path: Path) -> None:
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert exported.folder == tmp_path / "export" / "hf"
    assert exported.logits.lengths == (32, 128)
    assert exported.logits.difference <= exported.logits.tolerance
    assert exported.real_text
    assert "at lengths 32 and 128 logits differ by" in str(exported)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf"]


def test_model_that_differs_is_not_exported(model: ByHand, tmp_path: Path) -> None:
    model.wrong = 0.01
    with pytest.raises(TrainshortError, match=r"differ from the trained model's by 0\.01"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.usefixtures("model")
def test_without_data_random_tokens_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(checkpoint: object) -> EvaluationText:
        raise InputError("data is not prepared")

    monkeypatch.setattr(exporting, "held_out_text", missing)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert not exported.real_text
    assert "on random tokens" in str(exported)


@pytest.mark.usefixtures("model")
def test_comparison_that_would_take_too_much_memory_is_shorter_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "comparable_length", lambda length, *, heads: min(length, 50))
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert exported.logits.lengths == (32, 50)
    assert "at lengths 32 and 50 (not 128: transformers' attention scores" in str(exported)


@pytest.mark.parametrize(
    ("form", "message"),
    [("gguf", "gguf is not available in this version: use hf"), ("onnx", "'onnx' is not known: use hf")],
)
def test_other_formats_are_refused(tmp_path: Path, form: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_checkpoint(tmp_path, format=form, out=tmp_path / "out")


def test_folder_with_files_is_refused_before_the_checkpoint_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="has files in it"):
        export_checkpoint(tmp_path / "no checkpoint", format="hf", out=out)
