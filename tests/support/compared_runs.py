"""Run folders with the files that `compare` reads, made by hand."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from tests.support.evaluation import TOKENIZER
from tests.support.small_run import ONE_RANK, small_run
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import Manifest, write_manifest

Perplexities = dict[int, float]


def make_run(
    folder: Path, *, steps: int = 10, checkpoints: tuple[int, ...] = (10,), **sections: dict[str, Any]
) -> Path:
    """Write config.yaml, metrics.jsonl and checkpoints without tensors.

    The loss of a step is 5 less a tenth per step, and 3.5 + 1 / step in validation at each fifth step.

    Args:
        folder: The run folder.
        steps: Steps in metrics.jsonl.
        checkpoints: Steps that were saved.
        sections: Keys that differ from those of the small run on one rank.
    """
    folder.mkdir(parents=True)
    name = {"run": {"name": folder.name, "dir": str(folder)}}
    config = yaml.safe_dump(small_run(ONE_RANK, name, sections))
    (folder / "config.yaml").write_text(config)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            validation = {"validation_loss": 3.5 + 1 / step, "validation_seconds": 2.0} if step % 5 == 0 else {}
            metrics = {
                "step": step,
                "loss": 5 - step / 10,
                "tokens_seen": 256 * step,
                "step_seconds": 6.0,
                "tokens_per_second": 1000 + step % 3,
                "model_flops_utilization": None,
                "memory_gb": 1.0 + step / 10,
                **validation,
            }
            file.write(json.dumps(metrics) + "\n")
    for step in checkpoints:
        save(folder / "checkpoints" / f"step_{step:07d}", config, step=step)
    return folder


def save(checkpoint: Path, config: str, *, step: int) -> None:
    """Write a checkpoint's manifest, run file and tokenizer."""
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(config)
    (checkpoint / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    files = {path.name: describe_file(path) for path in checkpoint.iterdir()}
    manifest = Manifest(
        step=step,
        consumed_samples=8 * step,
        probe_loss=1.0,
        order_hash="",
        validation_loss=None,
        tensor=1,
        pipeline=1,
        vocab_size=600,
        tensors={},
        files=files,
    )
    write_manifest(checkpoint, manifest)


def replace_lines(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """Replace metrics.jsonl as a start does: by another file of that name."""
    new = run_dir / "new"
    new.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.replace(new, run_dir / "metrics.jsonl")


def add_report(
    run_dir: Path,
    perplexities: Perplexities,
    *,
    step: int = 10,
    text: str = "held-out",
    stride: int | None = None,
    newest: bool = True,
    **changes: Any,
) -> Path:
    """Write the report of an evaluation; return its path.

    Args:
        run_dir: The run folder.
        perplexities: Perplexity by length.
        step: Step of the checkpoint.
        text: Name of the text; its hash is made of it.
        stride: Of sliding windows; None if they do not overlap.
        newest: Whether it is the newest evaluation too.
        changes: Keys of the report that differ; None leaves one out.
    """
    name = f"step_{step:07d}"
    report = {
        "checkpoint": str(run_dir / "checkpoints" / name),
        "step": step,
        "train_length": 32,
        "data": {"name": text, "tokens": 5000, "words": 1000},
        "date": "2026-01-02T03:04:05Z",
        "text_sha256": f"of {text}",
        "tokenizer_sha256": "one",
        "text_path": None if text == "held-out" else f"/texts/{text}",
        "results": [_result(length, perplexity, stride) for length, perplexity in perplexities.items()],
    }
    none = ("text_path", "documents_sha256")  # keys that may be null
    report = {key: value for key, value in {**report, **changes}.items() if value is not None or key in none}
    path = run_dir / "evaluation" / name / f"{text.removesuffix('.txt')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    if newest:
        (run_dir / "evaluation" / "report.json").write_text(json.dumps(report))
    return path


def _result(length: int, perplexity: float, stride: int | None) -> dict[str, Any]:
    return {
        "length": length,
        "protocol": "nonoverlapping" if stride is None else "sliding",
        "stride": stride or length,
        "tokens": 4000,
        "loss": 1.0,
        "perplexity": perplexity,
        "word_perplexity": 10 * perplexity,
    }
