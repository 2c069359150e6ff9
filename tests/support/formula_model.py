"""A checkpoint of random weights for the tests of export, its model computed by formula."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import check_run
from configs.schema import Model
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.tokenizer_files import tokenizer_sha256
from data_pipeline.vocabulary import read_vocabulary
from parallel.parameter import Shard
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import SHAPE, random_weights, train_sentencepiece
from training.evaluation.text import EvaluationText
from training.families.table import shards_of
from training.model.cache import KeyValueCache

SENTENCE = "The quick brown fox jumps over the lazy dog.\n" * 40


class FormulaModel:
    """The model of the checkpoint, computed by formula; `error` is added to its logits."""

    def __init__(self, weights: dict[str, torch.Tensor], *, shape: Model = SHAPE) -> None:
        self.weights, self._shape = weights, shape
        self.certificate = {"position": "alibi"}
        self.error = 0.0
        self._ids: list[int] = []

    def change_weights(self, change: Callable[[torch.Tensor, Shard], torch.Tensor]) -> None:
        shards = shards_of(self._shape, vocab_size=len(self.weights["embedding.word.weight"]))
        self.weights = {name: change(weight, shards[name]) for name, weight in self.weights.items()}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return bloom_logits(self.weights, tokens, layers=self._shape.layers, heads=self._shape.heads) + self.error

    def next_logits(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Return the logits of the next token; more than one token begins a text, since nothing fills the cache."""
        self._ids = tokens[0].tolist() if tokens.shape[1] > 1 else [*self._ids, int(tokens)]
        return self.logits(torch.tensor([self._ids]))[:, -1]


def open_formula_model(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, shape: Model = SHAPE
) -> FormulaModel:
    """Let export open a checkpoint of random weights, trained at 32 tokens; return its model."""
    tokenizer = train_sentencepiece(tmp_path)
    vocab_size = len(read_vocabulary(tokenizer))
    weights = random_weights(shape, vocab_size=vocab_size)
    run_values["model"] = shape.model_dump()
    run_values["parallel"] = {}
    checkpoint = SimpleNamespace(
        path=tmp_path / "no run" / "checkpoints" / "step_0000010",
        step=10,
        manifest=SimpleNamespace(
            step=10, consumed_samples=80, vocab_size=vocab_size, files={}, tokenizer_sha256=tokenizer_sha256(tokenizer)
        ),
        config=check_run(run_values, name="small"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train_length=32,
        weights=lambda: weights,
        run_dir=tmp_path / "no run",
    )
    tokens = np.array(load_tokenizer(tokenizer).encode(SENTENCE), dtype=np.int64)
    model = FormulaModel(weights, shape=shape)
    monkeypatch.setattr("training.export.run.open_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr(
        "training.export.trained.held_out_text", lambda _: EvaluationText("held-out", tokens, None, None)
    )
    monkeypatch.setattr("training.export.trained.load_single", lambda _: model)
    return model
