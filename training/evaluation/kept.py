"""Find and read the reports that RUN_DIR/evaluation keeps. Imports no torch.

    evaluation/
        step_0000400/held-out.json, .md, .png   all that was measured of a checkpoint on the held-out text
        step_0000400/book.json, .md, .png       the same on --data book.txt
        step_0000400/held-out-bf16.json, ...    the same in --precision bf16
        hf-NAME/held-out.json, ...              the same of another model, by --hf
        report.json, report.md, perplexity.png  the newest evaluation, whatever it measured

Version 0.1.0 wrote report.json, report.md and perplexity.png to a checkpoint's folder too.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import InputError
from configs.paths import evaluation_folder
from configs.precisions import DEFAULT_PRECISION, PRECISIONS
from configs.schema_problems import first_problem

HELD_OUT = "held-out"
NEWEST = "report"
NEWEST_PLOT = "perplexity.png"
OTHER_MODEL = "hf-"  # prefix of the folders of models from elsewhere: `evaluate --hf`
# labels that no file may take: the held-out text's, and the names that version 0.1.0 wrote
_RESERVED = (HELD_OUT, NEWEST, "perplexity")
_LONGEST_SLUG = 60
# suffixes of the labels of reports in other precisions than the default
_PRECISIONS = tuple(f"-{precision}" for precision in PRECISIONS if precision != DEFAULT_PRECISION)

# whole numbers of files, which are used as divisors too
AtLeastOne = Annotated[int, Field(ge=1)]
Step = Annotated[int, Field(ge=0)]


class Kept(BaseModel):
    """A part of a file that a measurement keeps: the keys that are read of it, with their types.

    A key with a default is one that not every version writes. Others may stand beside them.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class KeptText(Kept):
    """The text of a measurement."""

    name: str
    tokens: int | None = None


class _KeptPositions(Kept):
    positions: list[float]
    loss: list[float | None]


class _KeptResult(Kept):
    length: AtLeastOne
    protocol: str
    stride: int
    scored: int = 0
    scale: str = ""
    tokens: int | None = None
    loss: float
    perplexity: Annotated[float, Field(gt=0)]
    word_perplexity: Annotated[float, Field(gt=0)] = 1.0
    bits_per_byte: float = 0.0
    standard_error: float = 0.0
    attention_density: float = 0.0
    loss_by_position: _KeptPositions | None = None
    date: str = ""
    draws: list[float] = Field(default_factory=list)


class _KeptReport(Kept):
    checkpoint: str
    step: Step
    train_length: AtLeastOne
    data: KeptText
    precision: str = DEFAULT_PRECISION
    date: str = ""
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    text_sha256: str | None = None
    documents_sha256: str | None = None
    text_path: str | None = None
    verdict: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    results: Annotated[list[_KeptResult], Field(min_length=1)]


def read_report(path: Path) -> dict[str, Any]:
    """Return a report after checking that it has the keys of every version, with values of their types.

    Raises:
        InputError: it cannot be read, or is not a report.
    """
    return read_measured(path, command="evaluate", form=_KeptReport)


def read_measured(path: Path, *, command: str, form: type[Kept]) -> dict[str, Any]:
    """Return what a command has written of a checkpoint, after checking the keys that are read of it.

    Args:
        path: A file of JSON.
        command: The command that measures it.
        form: What the file must hold.
    Raises:
        InputError: it cannot be read, lacks a key, or has a value of another type or without a finite number.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form.model_validate(report)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        told = f"{path} is not a report of `trainshort {command}` ({reason})"
        raise InputError(f"{told}: move it away and measure again") from None
    return report


def checkpoint_reports(run_dir: Path, *, checkpoint: str) -> dict[str, Path]:
    """Return the reports of a checkpoint by the label of their text, the held-out text's first.

    Args:
        run_dir: The run folder.
        checkpoint: Name of the checkpoint's folder.
    """
    reports = {path.stem: path for path in sorted((evaluation_folder(run_dir) / checkpoint).glob("*.json"))}
    older = reports.pop(NEWEST, None)  # of version 0.1.0
    if older is not None and HELD_OUT not in reports and is_held_out(read_report(older)):
        reports[HELD_OUT] = older
    labels = [label for label in reports if "." not in label]  # a dot marks a report that was replaced
    return {label: reports[label] for label in sorted(labels, key=lambda label: label != HELD_OUT)}


def newest_report(run_dir: Path) -> Path | None:
    """Return the report of the newest evaluation of a run; None if there is none."""
    path = evaluation_folder(run_dir) / f"{NEWEST}.json"
    return path if path.is_file() else None


def held_out_files(checkpoint: Path) -> Iterator[Path]:
    """Yield the files that may hold a checkpoint's report on the held-out text, in the order in which to try them.

    Args:
        checkpoint: The checkpoint's folder, in its run folder.
    """
    folder = evaluation_folder(checkpoint.parent.parent)
    for file in (
        *(folder / checkpoint.name / f"{HELD_OUT}{precision}.json" for precision in ("", *_PRECISIONS)),
        folder / checkpoint.name / f"{NEWEST}.json",  # of version 0.1.0
        folder / f"{NEWEST}.json",  # of any checkpoint and text
    ):
        if file.is_file():
            yield file


def report_label(report: dict[str, Any], folder: Path) -> str:
    """Return the label of a report in file names and in MLflow: its text's, and its precision unless it is fp32.

    Args:
        report: The contents of the report.
        folder: RUN_DIR/evaluation, with the reports so far.
    """
    precision = other_precision(report)
    return text_label(report, folder) + ("" if precision is None else f"-{precision}")


def other_precision(report: Mapping[str, Any]) -> str | None:
    """Return the precision of a report of any version; None if it is the default."""
    precision = str(report.get("precision", DEFAULT_PRECISION))
    return None if precision == DEFAULT_PRECISION else precision


def text_name(report: dict[str, Any]) -> str:
    """Return the name of a report's text: held-out, or that of a file."""
    return str(report["data"]["name"])


def is_held_out(report: dict[str, Any]) -> bool:
    """Return whether a report is of the run's held-out text, and not of a file of that name."""
    return report.get("text_path") is None and report.get("data", {}).get("name", HELD_OUT) == HELD_OUT


def is_same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two reports are of one text, in the same documents where attention stays inside them.

    Reports of versions that did not record the documents go by the text alone.
    """
    if one.get("text_sha256") is None or one["text_sha256"] != other.get("text_sha256"):
        return False
    recorded = all("documents_sha256" in report for report in (one, other))
    return not recorded or bool(one["documents_sha256"] == other["documents_sha256"])


def text_label(report: dict[str, Any], folder: Path) -> str:
    """Return the label of a report's text; two texts of one run never share it.

    It is the file's name without its endings. Files of the same name share it if they have the same path, or the same
    content (and documents, where attention stays inside them). Otherwise part of its hash is added to the later one's.

    Args:
        report: The contents of the report.
        folder: RUN_DIR/evaluation, with the reports so far.
    """
    if report["text_path"] is None:
        return HELD_OUT
    slug = text_slug(text_name(report))
    known = dict(_texts_like(slug, folder))
    # the content counts before the path
    same = [label for label, other in known.items() if is_same_text(other, report)]
    same += [label for label, other in known.items() if other.get("text_path") == report["text_path"]]
    if same:
        return same[0]
    is_taken = slug in known or slug in _RESERVED or slug.endswith(_PRECISIONS)
    mark = report.get("documents_sha256") or report["text_sha256"]
    return f"{slug}-{mark[:8]}" if is_taken else slug


def label_among_equals(report: dict[str, Any], folder: Path) -> str | None:
    """Return the label of a report's text if the run has several texts of its name, else None.

    Args:
        report: The contents of the report, of any version.
        folder: RUN_DIR/evaluation.
    """
    if report.get("text_path") is None:
        return None
    labels = {label for label, _ in _texts_like(text_slug(text_name(report)), folder)}
    return text_label(report, folder) if len(labels) > 1 else None


def text_slug(name: str) -> str:
    """Return a file's name without its endings, in lower case, with characters that every file system and MLflow takes.

    A label stays as it is.
    """
    path = Path(name)
    stem = Path(path.stem).stem if path.suffix in (".gz", ".xz", ".zst") else path.stem
    ascii_only = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", ascii_only).strip("-_")[:_LONGEST_SLUG] or "text"


def _texts_like(slug: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the labels made from a slug, each with a report on its text; an empty one if that cannot be read."""
    for path in sorted(folder.glob(f"*/{slug}*.json")):
        label = _without_precision(path.stem)
        if re.fullmatch(rf"{slug}(-[0-9a-f]{{8}})?", label):
            try:
                yield label, read_report(path)
            except InputError:  # it is broken: its name stays taken
                yield label, {}


def _without_precision(label: str) -> str:
    ends = [end for end in _PRECISIONS if label.endswith(end)]
    return label.removesuffix(ends[0]) if ends else label
