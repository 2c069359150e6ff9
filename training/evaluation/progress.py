"""Progress of an evaluation: a bar on a terminal; a line for each measurement, and in a log also on the way."""

import logging
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.figures import duration
from configs.terminal import status_console

logger = logging.getLogger(__name__)

# between two lines in a log within a measurement, and once the evaluation has taken `_LONG_SECONDS`
_LINE_SECONDS, _RARE_LINE_SECONDS, _LONG_SECONDS = 10.0, 30.0, 600.0


class EvaluationProgress:
    """Follows several measurements, one after the other. Use it as a context manager."""

    def __init__(self, *, inputs: int, measurements: int) -> None:
        """Set up a bar on a terminal, or lines.

        Args:
            inputs: Model inputs of all measurements: a measure of the work.
            measurements: Number of measurements.
        """
        console = status_console()
        self._inputs, self._measurements = inputs, measurements
        self._is_live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=inputs)
        self._done_inputs, self._finished, self._name = 0, 0, ""
        self._started_at = self._begun_at = self._shown_at = time.monotonic()

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """Begin a measurement."""
        self._name, self._begun_at = name, time.monotonic()
        self._bar.update(self._task, description=name)

    def advance(self, inputs: int) -> None:
        """Count inputs that the model has seen."""
        self._done_inputs += inputs
        self._bar.advance(self._task, inputs)
        now = time.monotonic()
        elapsed = now - self._started_at
        due = _LINE_SECONDS if elapsed < _LONG_SECONDS else _RARE_LINE_SECONDS
        if not self._is_live and now - self._shown_at >= due:
            self._shown_at = now
            left = elapsed * (self._inputs - self._done_inputs) / self._done_inputs
            logger.info(
                "%d/%d  %s: %.1f%% of the evaluation, about %s left",
                self._finished + 1,
                self._measurements,
                self._name,
                100 * self._done_inputs / self._inputs,
                duration(left),
            )

    def finish(self, outcome: str) -> None:
        """End the measurement and show its result."""
        self._finished, self._shown_at = self._finished + 1, time.monotonic()
        logger.info(
            "%d/%d  %s: %s, %s",
            self._finished,
            self._measurements,
            self._name,
            outcome,
            duration(self._shown_at - self._begun_at),
        )
