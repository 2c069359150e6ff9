"""Progress for a person: a live line on a terminal, a plain line from time to time in a log file."""

import time
from contextlib import suppress

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from configs.terminal import printable, status_console
from training.observers import Status, StepResult

LOG_SECONDS = 10.0  # between two lines in a log file


class ProgressLine:
    """Shows the latest step on standard error."""

    def __init__(self, headline: str, *, first_step: int, steps: int) -> None:
        self._console = status_console()
        self._steps, self._printed_at = steps, 0.0
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step, figures="")
        self._console.print("\n".join(map(printable, headline.split("\n"))), soft_wrap=True)
        self._progress.start()

    def on_step(self, result: StepResult) -> None:
        """Show the step."""
        with suppress(OSError):  # a full disk or a closed terminal must not end training
            self._show(result)

    def before_save(self) -> None:
        """Do nothing: there is nothing to flush."""

    def close(self, status: Status) -> None:
        """Stop refreshing and leave the last line visible."""
        with suppress(OSError):
            self._progress.stop()

    def _show(self, result: StepResult) -> None:
        figures = progress_text(result)
        self._progress.update(self._task, completed=result.step, figures=figures)
        due = time.monotonic() - self._printed_at > LOG_SECONDS or result.step == self._steps
        if not self._console.is_terminal and due:
            self._printed_at = time.monotonic()
            left = (self._steps - result.step) * result.step_seconds
            self._console.print(f"step {result.step}/{self._steps}  {figures}  {left:.0f} s left", soft_wrap=True)


def progress_text(result: StepResult) -> str:
    """Return a step's figures in one line."""
    parts = [f"loss {result.loss:.3f}", f"{result.tokens_per_second:,.0f} tokens/s"]
    if result.model_flops_utilization is not None:
        parts.append(f"utilization {result.model_flops_utilization:.0%}")
    parts.append(f"{result.memory_gb:.1f} GB")
    if result.validation_loss is not None:
        parts.append(f"validation {result.validation_loss:.3f}")
    return "  ".join(parts)
