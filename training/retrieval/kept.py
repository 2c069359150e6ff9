"""Find and read the reports that `retrieval` keeps. Imports no torch.

They lie in evaluation/step_0000400/retrieval/, named by their text, scale and precision: held-out.json, .md and .png.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from training.evaluation.kept import (
    HELD_OUT,
    AtLeastOne,
    Kept,
    KeptText,
    Step,
    other_precision,
    read_measured,
    text_name,
    text_slug,
)

RETRIEVAL_FOLDER = "retrieval"  # in the folder of a checkpoint's reports

_Share = Annotated[float, Field(ge=0, le=1)]
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _KeptCell(Kept):
    task: str
    length: AtLeastOne
    depth: float | None
    prompts: AtLeastOne
    recall: _Share
    recall_interval: _Interval
    choice: _Share
    choice_interval: _Interval
    log_probability: float
    margin: float


class _KeptRetrieval(Kept):
    checkpoint: str
    step: Step
    train_length: AtLeastOne
    data: KeptText
    seed: int
    chance: float
    precision: str
    scale: str = ""
    date: str
    text_path: str | None
    results: Annotated[list[_KeptCell], Field(min_length=1)]


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
    return read_measured(path, command="retrieval", form=_KeptRetrieval)


def retrieval_label(report: dict[str, Any]) -> str:
    """Return the name of a report's files: its text's, its scale if there is one, its precision unless it is fp32."""
    text = HELD_OUT if report["text_path"] is None else f"{text_slug(text_name(report))}-{report['text_sha256'][:8]}"
    scale = report["scale"].replace(":", "-") if "scale" in report else None
    return "-".join(filter(None, [text, scale, other_precision(report)]))
