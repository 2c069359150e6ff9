"""Find and read the reports that `retrieval` keeps. Imports no torch.

They lie in evaluation/step_0000400/retrieval/, named by their text, scale and precision: held-out.json, .md and .png.
"""

from pathlib import Path
from typing import Any

from training.evaluation.kept import HELD_OUT, other_precision, read_measured, text_name, text_slug

RETRIEVAL_FOLDER = "retrieval"  # in the folder of a checkpoint's reports
_NEEDED = ("checkpoint", "step", "train_length", "data.name", "seed", "chance", "precision", "date", "text_path")
_NEEDED_RESULT = (
    *("task", "length", "depth", "prompts", "recall", "recall_interval", "choice", "choice_interval"),
    *("log_probability", "margin"),
)


def retrieval_files(folder: Path, *, label: str = "*") -> list[Path]:
    """Return the reports of all checkpoints.

    Args:
        folder: RUN_DIR/evaluation.
        label: Label of the text, scale and precision: the name of the reports.
    """
    return sorted(folder.glob(f"*/{RETRIEVAL_FOLDER}/{label}.json"))


def read_retrieval(path: Path) -> dict[str, Any]:
    """Return a report.

    Raises:
        InputError: it cannot be read, or is not a report.
    """
    return read_measured(path, command="retrieval", keys=_NEEDED, result_keys=_NEEDED_RESULT)


def retrieval_label(report: dict[str, Any]) -> str:
    """Return the name of a report's files: its text's, its scale if there is one, its precision unless it is fp32."""
    text = HELD_OUT if report["text_path"] is None else f"{text_slug(text_name(report))}-{report['text_sha256'][:8]}"
    scale = report["scale"].replace(":", "-") if "scale" in report else None
    return "-".join(filter(None, [text, scale, other_precision(report)]))
