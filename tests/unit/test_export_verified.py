"""What an export is verified with, what its card says of that, and what becomes of an export that fails."""

import weakref
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
