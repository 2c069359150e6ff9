"""Output of `trainshort runs`."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from configs.commands import typed_path
from configs.figures import byte_size, counted, duration
from configs.terminal import printable
from launch.show.console import narrow_table, output_width, show_folded, show_lines

if TYPE_CHECKING:
    from launch.remove import Removal
    from launch.runs import RunSummary

_NAME_WIDTH = 16  # columns that a name gets before figures do
_LEAST_FIRST = ("best", "newest", "size", "age", "saves", "loss")  # what is left out on a narrow terminal
_NAMED_RUNS = 4


def show_runs(summaries: "list[RunSummary]", *, folder: Path) -> None:
    """Write a table with a line per run, then what is wrong with the broken ones."""
    if not summaries:
        show_lines(f"{folder} holds no run")
        return
    now = datetime.now(UTC)
    names = [printable(str(run.path.relative_to(folder) if run.path != folder else run.path)) for run in summaries]
    figures = _fitting([_figures(run, now=now) for run in summaries], names)
    table = narrow_table([*figures[0]], left=("state",))
    for column in table.columns:
        column.no_wrap = True
    table.add_column("run", overflow="fold")  # on a terminal; in a file a path stays on one line
    for cells, name in zip(figures, names, strict=True):
        table.add_row(*cells.values(), name)
    show_folded(table)
    hosts = sorted({run.host for run in summaries if run.state == "unknown" and run.host})
    if hosts:
        show_lines(f"unknown: started on {', '.join(hosts)}; it cannot be seen from here whether it runs")
    show_lines(*(f"broken: {run.problem}" for run in summaries if run.problem))


def _figures(run: "RunSummary", *, now: datetime) -> dict[str, str]:
    """Return the cells of a run's row by heading, without its name."""
    return {
        "state": run.state,
        "step": f"{run.step}/{run.steps or '?'}",
        "loss": _loss(run.loss),
        "best": _loss(run.best_validation),
        "saves": str(run.checkpoints),
        "newest": "-" if run.newest_checkpoint is None else str(run.newest_checkpoint),
        "size": byte_size(run.bytes),
        "age": age_text((now - run.written_at).total_seconds()) if run.written_at else "-",
    }


def _fitting(figures: list[dict[str, str]], names: list[str]) -> list[dict[str, str]]:
    """Leave out columns until the names have room beside the others."""
    room = (output_width() or math.inf) - min(max(map(len, names)), _NAME_WIDTH) - 2
    widths = {heading: max(len(heading), *(len(row[heading]) for row in figures)) for heading in figures[0]}
    for heading in _LEAST_FIRST:
        if sum(widths.values()) + 2 * len(widths) > room:  # two blanks between columns
            del widths[heading]
    return [{heading: row[heading] for heading in widths} for row in figures]


def removal_lines(removal: "Removal") -> list[str]:
    """Return what is lost if a run folder is removed, and what is kept."""
    run = removal.summary
    checkpoints = "no checkpoint"
    if run.checkpoints:
        checkpoints = f"{counted(run.checkpoints, 'checkpoint')}, the newest of step {run.newest_checkpoint:,}"
    size = byte_size(run.bytes - removal.kept_bytes) + (" without its data" if removal.kept else "")
    lines = [f"{printable(str(run.path))}: {run.state}, {size}, {checkpoints}"]
    if removal.unseen:
        lines.append(f"  {removal.unseen}")
    if removal.unsent:
        sync = f"trainshort track sync {typed_path(run.path)}"
        lines.append(f"  {_records(removal.unsent)} not sent to MLflow, which `{sync}` does")
    return lines + [f"  {line}" for line in _left(removal, keep="will keep")]


def removed_lines(removal: "Removal") -> list[str]:
    """Return what was removed, and what was kept."""
    run = removal.summary
    removed = f"removed {run.path}{' except its data' if removal.kept else ''}"
    lines = [f"{removed} ({byte_size(run.bytes - removal.kept_bytes)})"]
    if removal.unsent:
        lines.append(f"{_records(removal.unsent)} not sent to MLflow and went with it")
    return [*lines, *_left(removal, keep="kept")]


def _left(removal: "Removal", *, keep: str) -> list[str]:
    lines = []
    if removal.successors:
        come = _who(removal.successors, "comes", "come")
        lines.append(f"{come} from its checkpoints, without which that cannot be done again")
    if removal.searched and not removal.kept:
        lines.append(f"its data too: no other run in {' or '.join(map(str, removal.searched))} trains on it")
    if removal.kept:
        users = _who(removal.users, "trains", "train")
        lines.append(f"{keep} {removal.kept} ({byte_size(removal.kept_bytes)}): {users} on it")
    if removal.data:
        lines.append(f"{keep} {removal.data}, which it trained on")
    if removal.record:
        where = removal.record.uri or "the mlflow.db beside it"
        lines.append(f"{keep} its MLflow run {removal.record.run_id} in {where}")
    return lines


def _records(count: int) -> str:
    """Return `1 record was` or `2 records were`."""
    return f"{counted(count, 'record')} {'was' if count == 1 else 'were'}"


def _who(runs: Sequence[Path], one: str, more: str) -> str:
    """Return which runs do something, as in `runs/a, runs/b and 7 others train`, with the verb for one and for more."""
    here = Path.cwd()
    names = [str(run.relative_to(here) if run.is_relative_to(here) else run) for run in runs]
    if len(names) == 1:
        return f"{names[0]} {one}"
    if len(names) > _NAMED_RUNS:
        names = [*names[: _NAMED_RUNS - 1], f"{len(names) - _NAMED_RUNS + 1:,} others"]
    return f"{', '.join(names[:-1])} and {names[-1]} {more}"


def age_text(seconds: float) -> str:
    """Return the time since something happened; `now` below 10 s."""
    return duration(seconds) if seconds >= 10 else "now"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
