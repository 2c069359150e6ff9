"""The report of `retrieval`: JSON for programs, Markdown to read, a heat map. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import write_whole
from configs.scales import parse_scale
from configs.terminal import printable
from training.evaluation.folder import failed_write_keeps
from training.evaluation.markdown import made_by, verbatim
from training.retrieval.kept import retrieval_label
from training.retrieval.plot import draw_retrieval
from training.retrieval.shares import over_depths, share_with_interval

if TYPE_CHECKING:
    from training.evaluation.provenance import EvaluatedModel, Provenance
    from training.retrieval.cells import RetrievalCell
    from training.retrieval.request import RetrievalRequest

_NOTES = (
    "`recall`: share of the asked numbers in what the model generates with the likeliest tokens. `choice`: share that",
    "is likeliest among ten numbers, nine of them wrong: 10 % by chance. In brackets Wilson's interval of 95 %.",
    "`nats`: log-probability of a number; `margin`: how much it is above that of the wrong ones, mean. Depth 0 % is",
    "the beginning. Prompt and answer have the length together.",
)


def build_retrieval_report(
    cells: "Sequence[RetrievalCell]",
    *,
    model: "EvaluatedModel",
    text: tuple[str, int],
    request: "RetrievalRequest",
    provenance: "Provenance",
    chance: float,
) -> dict[str, Any]:
    """Return the contents of the JSON.

    Args:
        cells: What was measured.
        model: The model that was asked.
        text: Name and tokens of the haystack.
        request: What was asked for.
        provenance: What it was made from, and when.
        chance: `choice` of a model that knows nothing.
    """
    return {
        "checkpoint": str(model.path),
        "step": model.step,
        "train_length": model.train_length,
        "position": model.position,
        "attention": model.attention,
        "precision": model.precision,
        **({} if request.scale is None else {"scale": str(parse_scale(request.scale))}),
        "data": {"name": text[0], "tokens": text[1]},
        "seed": request.seed,
        "chance": chance,
        "date": provenance.date,
        "command": provenance.command,
        "versions": provenance.versions,
        "weights_sha256": provenance.weights_sha256,
        "tokenizer_sha256": provenance.tokenizer_sha256,
        "text_sha256": provenance.text_sha256,
        "text_path": provenance.text_path,
        "results": [cell.to_json() for cell in cells],
    }


def write_retrieval(report: dict[str, Any], place: Path) -> tuple[Path, Path, Path]:
    """Write the report of a checkpoint in place of an earlier one on the same text; return JSON, Markdown and PNG.

    Hold the lock of the checkpoint's folder of such reports: its files must be of one report.

    Args:
        report: The contents of the JSON.
        place: Where to.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    label = retrieval_label(report)
    document, table = place / f"{label}.json", place / f"{label}.md"
    with failed_write_keeps(report, folder=place):
        place.mkdir(parents=True, exist_ok=True)
        picture = draw_retrieval(report, place / f"{label}.png")
        write_whole(table, retrieval_markdown(report, plot=picture.name))
        # In ASCII, which can hold a file name that is not UTF-8. Last: where it is, the others are too.
        write_whole(document, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return document, table, picture


def retrieval_markdown(report: dict[str, Any], *, plot: str) -> str:
    """Return the report as Markdown.

    Args:
        report: The contents of the JSON.
        plot: Path of the PNG, from the folder of the Markdown.
    """
    scale = f", `--scale {report['scale']}`" if "scale" in report else ""
    lines = [
        "# Retrieval",
        "",
        f"![Retrieval by depth and length]({plot})",
        "",
        f"- checkpoint: {verbatim(report['checkpoint'])} (step {report['step']:,})",
        f"- position: {report['position']}, trained at {report['train_length']:,} tokens{scale}",
        f"- measured with attention {report['attention']} in {report['precision']}, seed {report['seed']}",
        f"- haystack: {verbatim(report['data']['name'])}, {report['data']['tokens']:,} tokens",
        f"- measured {made_by(report)}",
        "",
        "| task | length | x training length | prompts | recall | choice | nats | margin |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(result, report) for result in over_depths(report)),
        "",
        *_NOTES,
        "",
        "## By depth",
        "",
        "| task | length | depth | prompts | recall | choice | nats | margin | the first prompt's answer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *(_depth_row(result) for result in report["results"]),
        "",
    ]
    return "\n".join(lines)


def _row(result: dict[str, Any], report: dict[str, Any]) -> str:
    times = f"{result['length'] / report['train_length']:g}"
    return f"| {result['task']} | {result['length']:,} | {times} | {' | '.join(_figures(result))} |"


def _depth_row(result: dict[str, Any]) -> str:
    depth = "any" if result["depth"] is None else f"{100 * result['depth']:.0f} %"
    answer = printable(result["generated"].strip()).replace("`", "'").replace("|", "\\|")
    figures = " | ".join(_figures(result))
    return f"| {result['task']} | {result['length']:,} | {depth} | {figures} | `{answer or '-'}` |"


def _figures(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['prompts']:,}",
        share_with_interval(result, "recall"),
        share_with_interval(result, "choice"),
        f"{result['log_probability']:.2f}",
        f"{result['margin']:+.2f}",
    ]
