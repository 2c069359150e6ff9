"""What `harness` and `retrieval` leave in a run folder, made by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_harness(run_dir: Path, rows: Sequence[dict[str, Any]], *, step: int = 10) -> Path:
    """Write the results of tasks; return their JSON.

    Args:
        run_dir: The run folder.
        rows: Keys of each row that differ from those of `piqa`.
        step: Step of the checkpoint.
    """
    name = f"step_{step:07d}"
    plain = {
        "task": "piqa", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.01, "higher_is_better": True,
        "version": 1.0, "fewshot": 0, "samples": 1838, "limit": None, "max_length": 1024, "precision": "fp32",
        "date": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    made = {"date": plain["date"], "command": None, "versions": {"lm_eval": "0.4.13"}, "cut": 0}
    report = {
        "checkpoint": str(run_dir / "checkpoints" / name),
        "step": step,
        "train_length": 32,
        "weights_sha256": "a",
        "evaluations": [made],
        "results": [{**plain, **row} for row in rows],
    }
    return _write(report, run_dir / "evaluation" / name / "harness" / "results.json")


def add_retrieval(
    run_dir: Path,
    shares: dict[str, dict[int, dict[float | None, float]]],
    *,
    step: int = 10,
    text: str = "held-out",
    **changes: Any,
) -> Path:
    """Write the report of a retrieval; return its JSON.

    Args:
        run_dir: The run folder.
        shares: Recall by task, length and depth; the choice is half of what is left better.
        step: Step of the checkpoint.
        text: Name of the text.
        changes: Keys of the report that differ.
    """
    name = f"step_{step:07d}"
    report = {
        "checkpoint": str(run_dir / "checkpoints" / name),
        "step": step,
        "train_length": 32,
        "position": "alibi",
        "attention": "sdpa",
        "precision": "fp32",
        "data": {"name": text, "tokens": 5000},
        "seed": 1,
        "chance": 0.1,
        "date": "2026-01-02T03:04:05Z",
        "text_sha256": f"of {text}",
        "tokenizer_sha256": "one",
        "text_path": None if text == "held-out" else f"/texts/{text}",
        "results": [
            _cell(task, length, depth, share)
            for task, lengths in shares.items()
            for length, depths in lengths.items()
            for depth, share in depths.items()
        ],
        **changes,
    }
    return _write(report, run_dir / "evaluation" / name / "retrieval" / f"{text.removesuffix('.txt')}.json")


def _cell(task: str, length: int, depth: float | None, recall: float) -> dict[str, Any]:
    choice = (1 + recall) / 2
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "prompts": 20,
        "recall": recall,
        "recall_interval": [max(0.0, recall - 0.1), min(1.0, recall + 0.1)],
        "choice": choice,
        "choice_interval": [choice, choice],
        "log_probability": -2.0,
        "margin": 1.5,
        "generated": " 12345.",
    }


def _write(report: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    return path
