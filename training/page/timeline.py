"""The time line of a run, and what it cost. Imports no torch.

It shows the time that was spent on training, one start after the other: days in a queue between two starts would leave
no room for it. The table below it has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from configs.figures import counted, duration, energy
from training.checkpoint.manifest import list_checkpoints
from training.page.starts import RunStart
from training.rollbacks import Rollback

_MOST_SAVES = 200  # marks of saves that succeeded; a failed one always has its mark
_GAP, _MOST_GAPS = 0.6, 30.0  # per cent of the width: between two starts, and all gaps together
_LEAST_PAUSE = 60.0  # seconds between two starts that are worth a line of the table
_TICKS = 4


@dataclass(frozen=True)
class TimelineBar:
    """Steps of one start, all kept or all lost: place and width in per cent of the line."""

    left: float
    width: float
    is_lost: bool
    title: str


@dataclass(frozen=True)
class TimelineMark:
    """A save at a place in per cent of the line; what happened is `saved`, `failed` or `refused`."""

    left: float
    happened: str
    title: str


@dataclass(frozen=True)
class Timeline:
    """A run's starts on one line, and a table of them.

    Attributes:
        bars: The steps of each start in their order.
        marks: Saves and refused starts.
        ticks: Place in per cent, and the time of training there.
        headings: Headings of the table.
        rows: A row per start.
    """

    bars: tuple[TimelineBar, ...]
    marks: tuple[TimelineMark, ...]
    ticks: tuple[tuple[float, str], ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def draw_timeline(starts: Sequence[RunStart], *, run_dir: Path) -> Timeline:
    """Return the time line of a run with at least one start."""
    total = sum(start.kept_seconds + start.lost_seconds for start in starts) or 1.0
    gap = min(_GAP, _MOST_GAPS / len(starts))
    scale = (100 - gap * (len(starts) - 1)) / total
    bars: list[TimelineBar] = []
    marks: list[TimelineMark] = []
    left = 0.0
    for number, start in enumerate(starts, 1):
        if start.refused is not None:
            marks.append(TimelineMark(left, "refused", f"start {number} was refused: {start.refused}"))
        for seconds, step, happened in start.saves():
            words = "a save ended" if happened == "saved" else "a save failed"
            marks.append(TimelineMark(left + seconds * scale, happened, f"{words} after step {step:,}"))
        lost_text = f", {counted(len(start.lost), 'step')} taken again" if start.lost else ""
        title = f"start {number}: steps {start.step + 1:,} to {start.last_step:,}{lost_text}"
        for stretch in start.stretches:
            bars.append(TimelineBar(left, stretch.seconds * scale, stretch.is_lost, title))
            left += bars[-1].width
        left += gap
    newest = [checkpoint.step for checkpoint in list_checkpoints(run_dir)[-1:]]
    if newest == [starts[-1].last_step] and bars:
        marks.append(TimelineMark(left - gap, "saved", f"a save ended after step {newest[0]:,}"))
    ticks = [(100 * part / _TICKS, duration(total * part / _TICKS) if part else "0") for part in range(_TICKS + 1)]
    headings, rows = _table(starts)
    return Timeline(tuple(bars), tuple(_thinned(marks)), tuple(ticks), headings, rows)


def cost_rows(
    starts: Sequence[RunStart], *, device: str | None, rollbacks: Sequence[Rollback]
) -> list[tuple[str, str]]:
    """Return what a run cost: names and values; without what is not known.

    A device hour is an hour of one rank, which has a device of its own. Energy is that of the ranks' GPUs, from the
    first step of a start to its last.

    Args:
        starts: The run's starts.
        device: Name of the device; None if it is not known.
        rollbacks: The run's.
    """
    lost = sum(start.lost_seconds for start in starts)
    rows = [("time of training", duration(lost + sum(start.kept_seconds for start in starts)))]
    if all(start.ranks or not (start.steps or start.lost) for start in starts):
        hours = sum((start.ranks or 0) * (start.kept_seconds + start.lost_seconds) for start in starts) / 3600
        rows.append(("device hours", f"{_hours(hours)}{'' if device is None else f' on {device}'}"))
    rows += _energy_rows(starts)
    if lost:
        steps = sum(len(start.lost) for start in starts)
        after = "a restart or a divergence" if rollbacks else "a restart"
        rows.append(("lost", f"{duration(lost)}: {counted(steps, 'step')} trained again after {after}"))
    if rollbacks:
        newest = rollbacks[-1]
        last = f"{'the newest ' if len(rollbacks) > 1 else ''}from step {newest.from_step:,} to step {newest.step:,}"
        rows.append(("went back", f"{counted(len(rollbacks), 'time')} after a divergence, {last}"))
    return rows


def _energy_rows(starts: Sequence[RunStart]) -> list[tuple[str, str]]:
    """Return the energy of the steps whose GPUs' drivers tell it; none if no step's do."""
    taken = [steps for start in starts for steps in (start.steps, start.lost)]
    joules = [value for steps in taken for value in steps.known("energy_joules")]
    if not joules:
        return []
    count = sum(map(len, taken))
    part = "" if len(joules) == count else f" in {len(joules):,} of {counted(count, 'step')}"
    return [("energy", f"{energy(sum(joules))} by the GPUs' own counters{part}")]


def _table(starts: Sequence[RunStart]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    headings = ("start", "began to train", "pause before", "ranks", "steps", "time", "lost steps", "failed saves")
    rows = []
    ended_at = None
    for number, start in enumerate(starts, 1):
        began_at, seconds = start.began_at, start.kept_seconds + start.lost_seconds
        pause = "-"
        if began_at is not None and ended_at is not None:
            paused = (began_at - ended_at).total_seconds()
            pause = duration(paused) if paused >= _LEAST_PAUSE else "-"
        ended_at = None if began_at is None else began_at + timedelta(seconds=seconds)
        is_empty = not (start.steps or start.lost)
        what = "refused" if start.refused is not None else "none" if is_empty else None
        rows.append(
            (
                f"{number}",
                "-" if began_at is None else began_at.strftime("%Y-%m-%d %H:%M %Z").strip(),
                pause,
                "-" if start.ranks is None else f"{start.ranks:,}",
                what or f"{start.step + 1:,} to {start.last_step:,}",
                duration(seconds),
                f"{len(start.lost):,}" if start.lost else "-",
                f"{failed}" if (failed := sum(kind == "failed" for *_, kind in start.saves())) else "-",
            )
        )
    return headings, tuple(rows)


def _thinned(marks: list[TimelineMark]) -> list[TimelineMark]:
    saved = [mark for mark in marks if mark.happened == "saved"]
    every = -(-len(saved) // _MOST_SAVES) or 1
    return [*saved[::-1][::every][::-1], *(mark for mark in marks if mark.happened != "saved")]


def _hours(hours: float) -> str:
    return f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}"
