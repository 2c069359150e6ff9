"""Output of `retrieval`."""

from pathlib import Path
from typing import Any

from configs.paths import checkpoints_folder
from launch.show.console import narrow_table, show_lines, show_table
from training.evaluation.kept import other_precision
from training.retrieval.shares import over_depths, share_with_interval


def show_retrieval(report: dict[str, Any], *, checkpoint: Path) -> None:
    """Write what a checkpoint retrieves, for each task and length.

    Args:
        report: The contents of the report.
        checkpoint: What was measured, as given: the checkpoint, or its run folder.
    """
    measured = Path(report["checkpoint"])
    if checkpoint.resolve() != measured.resolve():
        checkpoint = checkpoints_folder(checkpoint) / measured.name
    precision = other_precision(report)
    computed = "" if precision is None else f", computed in {precision}"
    show_lines(f"{checkpoint}, trained at {report['train_length']:,} tokens{computed}")
    table = narrow_table(
        ("task", "length", "x trained", "prompts", "recall", "choice", "nats", "margin"), left=("task",)
    )
    for result in over_depths(report):
        table.add_row(
            result["task"],
            f"{result['length']:,}",
            f"{result['length'] / report['train_length']:g}",
            f"{result['prompts']:,}",
            share_with_interval(result, "recall"),
            share_with_interval(result, "choice"),
            f"{result['log_probability']:.2f}",
            f"{result['margin']:+.2f}",
        )
    table.add_section()
    table.add_row("a guess", "-", "-", "-", "0 %", f"{100 * report['chance']:.0f} %", "-", "+0.00")
    show_table(table)
