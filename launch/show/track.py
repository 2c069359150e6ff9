"""Output of `trainshort track`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.figures import counted
from launch.show.console import show_lines

if TYPE_CHECKING:
    from training.tracking.sync import Synced


def show_synced(runs: "Sequence[Synced]", *, again: bool = False) -> None:
    """Write what was sent of runs.

    Args:
        runs: What was sent of each.
        again: Whether it is looked at again and again.
    """
    for run in runs:
        sent = f"sent {counted(run.sent, 'record')}" if run.sent else "nothing was left to send"
        show_lines(f"{run.run_dir}: {sent}; run {run.run_id} of {run.store} is {run.status}")
        if run.is_open and not again:
            show_lines("  it trains, or it was killed on another machine, which shows after 15 minutes of silence")
        show_lines(*(f"  MLflow refused a record, which is dropped: {reason}" for reason in run.refused))


def show_copied(run_dir: Path, count: int, *, to: str) -> None:
    """Write how much of a run's curves was copied."""
    show_lines(f"{run_dir}: copied {counted(count, 'record')} to {to}")
