"""Output of `trainshort runs`."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from configs.terminal import printable
from launch.show.console import narrow_table, show_folded, show_lines

if TYPE_CHECKING:
    from launch.remove import Removal
    from launch.runs import RunSummary


def show_runs(summaries: "list[RunSummary]", *, folder: Path) -> None:
    """Write a table with a line per run, then what is wrong with the broken ones."""
    if not summaries:
        show_lines(f"{folder} holds no run")
        return
    now = datetime.now(UTC)
    table = narrow_table(("state", "step", "loss", "best", "saves", "newest", "size", "age"), left=("state",))
    for column in table.columns:
        column.no_wrap = True
    table.add_column("run", overflow="fold")  # on a terminal; in a file a path stays on one line
    for run in summaries:
        path = run.path.relative_to(folder) if run.path != folder else run.path
        table.add_row(
            run.state,
            f"{run.step}/{run.steps or '?'}",
            _loss(run.loss),
            _loss(run.best_validation),
            str(run.checkpoints),
            "-" if run.newest_checkpoint is None else str(run.newest_checkpoint),
            size_text(run.bytes),
            age_text(now - run.written_at) if run.written_at else "-",
            printable(str(path)),
        )
    show_folded(table)
    hosts = sorted({run.host for run in summaries if run.state == "unknown" and run.host})
    if hosts:
        show_lines(f"unknown: started on {', '.join(hosts)}; from here nobody sees whether it runs")
    show_lines(*(f"broken: {run.problem}" for run in summaries if run.problem))


def removal_lines(removal: "Removal") -> list[str]:
    """Return what is lost if a run folder is removed, and what is kept."""
    run = removal.summary
    checkpoints = "no checkpoint"
    if run.checkpoints:
        checkpoints = f"{run.checkpoints} checkpoint{'s' * (run.checkpoints > 1)}, the newest of step"
        checkpoints += f" {run.newest_checkpoint:,}"
    lines = [f"{printable(str(run.path))}: {run.state}, {size_text(run.bytes)}, {checkpoints}"]
    if removal.unseen:
        lines.append(f"  {removal.unseen}")
    return lines + [f"  {line}" for line in _left(removal)]


def removed_lines(removal: "Removal") -> list[str]:
    """Return what was removed, and what was kept."""
    run = removal.summary
    return [f"removed {run.path} ({size_text(run.bytes)})", *_left(removal)]


def _left(removal: "Removal") -> list[str]:
    lines = []
    if removal.kept:
        lines.append(f"kept {removal.kept}: {', '.join(map(str, removal.users))} trains on it")
    if removal.data:
        lines.append(f"kept {removal.data}, which it trained on")
    if removal.record:
        where = removal.record.uri or "the mlflow.db beside it"
        lines.append(f"kept its MLflow run {removal.record.run_id} in {where}")
    return lines


def size_text(size: int) -> str:
    """Return a number of bytes with a unit: 999 B, 1.2 MB, 34 GB."""
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"


def age_text(age: timedelta) -> str:
    """Return how long ago something was: 5 s, 12 min, 3 h, 40 d."""
    seconds = max(0, int(age.total_seconds()))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
