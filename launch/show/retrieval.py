"""Output of `retrieval`."""

from pathlib import Path
from typing import Any

from launch.show.console import narrow_table, show_table
from launch.show.model import show_measured_checkpoint
from training.retrieval.shares import over_depths, share_with_interval


def show_retrieval(report: dict[str, Any], *, checkpoint: Path) -> None:
    """Write what a checkpoint retrieves, for each task and length.

    Args:
        report: The contents of the report.
        checkpoint: What was measured, as given: the checkpoint, or its run folder.
    """
    show_measured_checkpoint(report, checkpoint=checkpoint)
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
