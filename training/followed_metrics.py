"""Follow metrics.jsonl while a run writes it: its newest steps, its validations, and curves of bounded size.

Imports no torch.
"""

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.paths import metrics_path
from configs.schema import RunConfig
from training.appended_lines import AppendedLines
from training.metrics_file import Best, better_of, validation_of
from training.metrics_reader import STEP_TIMES, step_fields
from training.pace import RECENT_STEPS, Pace

CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
CURVE_POINTS = 512
_KEPT_PAUSES = 20  # validations and saves whose times tell how long the next ones take


class Curve:
    """The means of equally many values each: at most twice CURVE_POINTS of them, however many values there are.

    Attributes:
        lowest: Lowest of the values; infinite if there are none.
        highest: Likewise.
    """

    def __init__(self) -> None:
        self.lowest, self.highest = math.inf, -math.inf
        self._means: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Add a value behind the others."""
        self._sum, self._count = self._sum + value, self._count + 1
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * CURVE_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def points(self, most: int) -> list[float]:
        """Return the curve as at most `most` means."""
        means = self._means + ([self._sum / self._count] if self._count else [])
        count = min(most, len(means))
        parts = [means[place * len(means) // count : (place + 1) * len(means) // count] for place in range(count)]
        return [sum(part) / len(part) for part in parts]


class FollowedMetrics:
    """What metrics.jsonl holds so far; a start that replaces the file is read from its beginning.

    Attributes:
        newest: Fields of the last step; empty if there is none.
        recent: Fields of the last steps, at most RECENT_STEPS.
        validation: The newest validation; None if there is none.
        validated: All fields of its step; empty likewise.
        best: The lowest one.
        curves: Curves of the fields in CURVES, over all steps.
    """

    def __init__(self, run_dir: Path) -> None:
        self._lines = AppendedLines(metrics_path(run_dir))
        self._forget()

    def _forget(self) -> None:
        self.newest: dict[str, Any] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.validation: Best | None = None
        self.validated: dict[str, Any] = {}
        self.best: Best | None = None
        self.curves = {name: Curve() for name in CURVES}
        self._pauses: deque[dict[str, Any]] = deque(maxlen=_KEPT_PAUSES)

    def update(self) -> None:
        """Read what was appended.

        Raises:
            OSError: the file cannot be read.
        """
        if self._lines.starts_over():
            self._forget()
        for line in self._lines.read():
            if (step := step_fields(line)) is not None:
                self._take(step)

    def _take(self, step: dict[str, Any]) -> None:
        self.newest = step
        self.recent.append(step)
        if "save_seconds" in step or "validation_seconds" in step:
            self._pauses.append(step)
        if (measured := validation_of(step)) is not None:
            self.validation, self.validated, self.best = measured, step, better_of(self.best, measured)
        for name, curve in self.curves.items():
            value = step.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                curve.add(value)

    def steps_after(self, step: int) -> list[dict[str, Any]]:
        """Return the recent steps of the start that began after one, without its first, which warms up.

        If it has taken no other yet, return that one; if none, those of the starts before.
        """
        steps = [each for each in self.recent if each["step"] > step]
        if len(steps) > 1 and steps[0]["step"] == step + 1:
            return steps[1:]
        return steps or [*self.recent]

    def pace(self, config: RunConfig, *, step: int) -> Pace | None:
        """Return the pace of the start that began after a step; None if it has taken no step yet."""
        pace, now = Pace(config, step=step), 0.0
        known = {each["step"]: each for each in (*self._pauses, *self.recent) if each["step"] > step}
        for done in sorted(known):
            times = [number(known[done], name) for name in STEP_TIMES]
            seconds, validation, save = (time if math.isfinite(time or 0.0) else None for time in times)
            if not seconds:
                continue  # of a version that did not measure it
            if save:
                pace.on_save(save)
            now += seconds + (validation or 0.0) + (save or 0.0)
            pace.on_step(done, seconds=seconds, validation_seconds=validation, now=now)
        return pace if pace.steps_taken else None

    @property
    def longest_pause(self) -> float:
        """Seconds of the longest validation and save that are known, together."""
        names = ("save_seconds", "validation_seconds")
        return sum(max((number(each, name) or 0.0 for each in self._pauses), default=0.0) for name in names)


def number(step: dict[str, Any], name: str) -> float | None:
    """Return a field that holds a number, which may be nan; None for any other value."""
    value = step.get(name)
    return float(value) if isinstance(value, int | float) else None


def mean_rate(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a rate over steps, each with the weight of its time; None if none has both."""
    known = [(number(step, name), number(step, "step_seconds")) for step in steps]
    weighted = [(rate, seconds) for rate, seconds in known if rate is not None and seconds]
    total = sum(seconds for _, seconds in weighted)
    return sum(rate * seconds for rate, seconds in weighted) / total if total > 0 else None
