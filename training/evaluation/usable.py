"""The longest text that a model was measured to be usable at, and the context that it uses. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import MANIFEST_NAME
from training.evaluation.kept import held_out_files, is_held_out, read_report
from training.evaluation.results import is_whole

# how much worse than the best a perplexity may be
_RATIO = 1.01


@dataclass(frozen=True)
class HeldOutReport:
    """What was measured of a checkpoint on its run's held-out text.

    Attributes:
        path: The file.
        contents: The report.
    """

    path: Path
    contents: Mapping[str, Any]


def usable_length(report: Mapping[str, Any], *, scale: str | None = None) -> int:
    """Return the longest length whose perplexity is within 1 % of the best, and the training length at least.

    Only windows that do not overlap count: in a sliding window each prediction has a long context at any length.

    Args:
        report: The contents of a report.
        scale: The scale of the positions; None for positions as trained.
    """
    return int(max(report["train_length"], *lengths_near_best(whole_windows(report, scale=scale)), 0))


def lengths_near_best(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the lengths whose perplexity is within 1 % of the best."""
    best = min((result["perplexity"] for result in results), default=0.0)
    return [int(result["length"]) for result in results if result["perplexity"] <= _RATIO * best]


def effective_context(contexts: Sequence[int], losses: Sequence[float]) -> int:
    """Return the shortest context whose perplexity is within 1 % of the best one's.

    The best, and not the longest, since longer contexts than in training may do harm.

    Args:
        contexts: Tokens of context, ascending.
        losses: The loss of the same tokens with each, in nats.
    """
    limit = min(losses) + math.log(_RATIO)
    return next(context for context, loss in zip(contexts, losses, strict=True) if loss <= limit)


def whole_windows(report: Mapping[str, Any], *, scale: str | None = None) -> list[dict[str, Any]]:
    """Return the results of windows that do not overlap, with one scale or none, the shortest first."""
    results = [result for result in report["results"] if is_whole(result, scale=scale)]
    return sorted(results, key=lambda result: result["length"])


def find_held_out_report(checkpoint: Path, *, step: int, sha256: str) -> HeldOutReport | None:
    """Return what was measured of a checkpoint on held-out text, without overlap; None if nothing was.

    A broken report, and one of other weights or of another text, is passed over. So is one with masked documents: what
    asks for it, an export or the harness, masks none, and attention would reach further than it was measured to.

    Args:
        checkpoint: The checkpoint's folder, in its run folder.
        step: Its training step.
        sha256: Its `training.checkpoint.manifest.model_sha256`.
    """
    for path in held_out_files(checkpoint):
        try:
            report = read_report(path)
        except InputError:
            continue
        is_masked = report.get("documents_sha256") is not None
        is_measured = is_held_out(report) and whole_windows(report) and not is_masked
        if is_measured and _is_of(report, path, checkpoint, step=step, sha256=sha256):
            return HeldOutReport(path, report)
    return None


def _is_of(report: Mapping[str, Any], path: Path, checkpoint: Path, *, step: int, sha256: str) -> bool:
    if "weights_sha256" in report:
        return bool(report["weights_sha256"] == sha256)
    # Version 0.1.0 wrote no hash. Its report has the checkpoint's name and step, and was written after the checkpoint:
    # a run that was trained again in the same folder has checkpoints of the same names.
    names = (path.parent.name, Path(str(report["checkpoint"])).name)
    newer = path.stat().st_mtime >= (checkpoint / MANIFEST_NAME).stat().st_mtime
    return checkpoint.name in names and report["step"] == step and newer
