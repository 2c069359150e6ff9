"""A run whose checkpoint is a model for which every token is equally likely, and reports of evaluations."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import check_run
from configs.protocols import parse_protocol
from tests.support.small_run import small_run
from training.evaluation.perplexity import PerplexityResult, measure_loss
from training.evaluation.provenance import Provenance, evaluated_model
from training.evaluation.report import build_report
from training.evaluation.request import EvaluationRequest
from training.evaluation.resampling import units_of
from training.evaluation.run import evaluate_checkpoint
from training.evaluation.sums import LossSums
from training.evaluation.text import EvaluationText
from training.evaluation.windows import place_windows

VOCAB = 32
CERTIFICATE = {"ranks": [{"position": "alibi", "backend": "sdpa", "precision": "fp32"}]}
TOKENIZER = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0" / "data" / "tokenizer.model"
PROVENANCE = Provenance(
    date="2026-01-02T03:04:05Z",
    command="trainshort evaluate 'a run'",
    versions={"trainshort": "0.2.0", "torch": "2.13.0", "commit": "4ea461ed7004e44c47ba3cd208d1157812bf0401"},
    weights_sha256="11" * 32,
    tokenizer_sha256="22" * 32,
    text_sha256="33" * 32,
    documents_sha256=None,
    text_path=None,
    text_bytes=4000,
)


class UniformModel:
    """A model for which every token is equally likely."""

    batch_tokens = 8192
    certificate = CERTIFICATE
    windows = None
    blocks = ()

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        """Return the logarithm of the vocabulary's size for each of the last predicted tokens."""
        return torch.full((len(tokens), last or tokens.shape[1] - 1), math.log(VOCAB))


def evaluate(run_dir: Path, **options: Any) -> dict[str, Any]:
    """Evaluate a run with options of `EvaluationRequest`, and return the report."""
    return evaluate_checkpoint(run_dir, EvaluationRequest(**options))


def measure(scorer: Any, tokens: np.ndarray, *, length: int, protocol: str, **options: Any) -> PerplexityResult:
    """Return the result of a text at one length.

    Args:
        scorer: The model.
        tokens: The text, [tokens].
        length: Inputs of a window.
        protocol: How the window moves, as on the command line.
        options: More arguments of `measure_loss` and `LossSums`, and the text's `documents`.
    """
    parsed = parse_protocol(protocol)
    windows = place_windows(len(tokens), length=length, protocol=parsed)
    units = units_of(options.pop("documents", None), tokens=len(tokens))
    sums = LossSums(windows, units, attention=options.pop("attention", None))
    options = {"batch_tokens": 8192, **options}
    return measure_loss(scorer, tokens, protocol=parsed, units=units, sums=sums, **options)


def text_of(tokens: int, *, words: int | None = 100, unigram: float | None = 40.0) -> EvaluationText:
    """Return a held-out text of one token, repeated."""
    return EvaluationText("held-out", np.zeros(tokens, dtype=np.int64), words, unigram)


def opened_checkpoint(path: Path, values: dict[str, Any], *, step: int, sha256: str = "1") -> Any:
    """Return what evaluation takes of an open checkpoint.

    Args:
        path: Its folder.
        values: Its run.
        step: Its step.
        sha256: Stands for the hash of its weights.
    """
    file, config = SimpleNamespace(sha256=sha256), check_run(values, name="small")
    return SimpleNamespace(
        path=path,
        run_dir=path.parent.parent,
        step=step,
        config=config,
        train_length=config.data.sequence_length,
        manifest=SimpleNamespace(files={"stage_00_tensor_00.weight.safetensors": file}, tokenizer_sha256="22" * 32),
        tokenizer=TOKENIZER,
    )


def uniform_run(folder: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a run folder whose checkpoint of step 7 is a uniform model, with 1000 tokens of held-out text."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    opened = opened_checkpoint(folder / "checkpoints" / "step_0000007", values, step=7)
    monkeypatch.setattr("training.evaluation.precheck.check_request", lambda *_, **__: None)
    monkeypatch.setattr("training.evaluation.precheck.chosen_splits", lambda *_, **__: (1, 1))
    monkeypatch.setattr("training.evaluation.run.open_checkpoint", lambda path: opened)
    monkeypatch.setattr("training.evaluation.run.held_out_text", lambda _: text_of(1000))
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: UniformModel())
    return folder


def report_of(
    *results: PerplexityResult,
    of: EvaluationText | None = None,
    context: dict[str, Any] | None = None,
    **provenance: str | None,
) -> dict[str, Any]:
    """Return the report of an evaluation.

    Args:
        results: Its results.
        of: Its text.
        context: What was measured of the context.
        provenance: Fields of the provenance that differ.
    """
    return build_report(
        results,
        model=evaluated_model(
            opened_checkpoint(Path("runs/one/checkpoints/step_0000007"), small_run(), step=7), CERTIFICATE
        ),
        text=of or text_of(1000),
        context=context,
        provenance=replace(PROVENANCE, **provenance),  # type: ignore[arg-type]
    )
