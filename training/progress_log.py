"""Log a run's progress: steps, validations, saves and the end, on the terminal and in the run's log."""

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from configs.paths import run_folder
from configs.schema import RunConfig
from configs.terminal import Terminal
from training.metrics_file import Best, better_of, validation_of
from training.metrics_reader import read_steps
from training.observers import Observer, Save, Status, StepResult
from training.pace import Pace
from training.progress_lines import closing_lines, live_line, save_line, step_line, validation_lines

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0  # between two lines of steps, unless `train.log_every` is set
LIVE_SECONDS = 0.1  # between two changes of the live line


class ProgressLog(Observer):
    """Logs a line from time to time, one for each validation and save, and a summary at the end.

    Args:
        config: The run.
        first_step: The step that this start continues from.
        best: The best validation up to that step; None if there was none.
        terminal: Shows the live line; None for none.
    """

    def __init__(self, config: RunConfig, *, first_step: int, best: Best | None, terminal: Terminal | None) -> None:
        self._config, self._best = config, best
        self._terminal = terminal or Terminal()  # without a live line
        self._pace = Pace(config, step=first_step)
        self._newest: StepResult | None = None
        self._since_line: list[StepResult] = []  # the steps since the last line
        self._line_at = self._live_at = float("-inf")

    def on_step(self, result: StepResult) -> None:
        """Show the step, and log it if a line is due."""
        now, train = time.monotonic(), self._config.train
        self._newest = result
        self._since_line.append(result)
        seconds, validation_seconds = result.step_seconds, result.validation_seconds
        self._pace.on_step(result.step, seconds=seconds, validation_seconds=validation_seconds, now=now)
        due = now - self._line_at >= LOG_SECONDS if train.log_every is None else result.step % train.log_every == 0
        if due or result.step == train.steps:
            self._log_step(result)
            self._line_at = now
        if result.validation_loss is not None:
            self._log_validation(result, loss=result.validation_loss)
        if now - self._live_at >= LIVE_SECONDS:
            self._show()
            self._live_at = now

    def before_validation(self, step: int) -> None:
        """Show it, as it may take minutes."""
        self._show("validating")

    def before_save(self) -> None:
        """Show it, as it may take minutes."""
        if self._since_line and self._newest and self._newest.step % self._config.checkpoint.every:
            self._log_step(self._newest)  # the run stops here
        self._show("saving")

    def on_save(self, save: Save) -> None:
        """Log the save."""
        logger.info("%s", save_line(save, size_bytes=_size_of(save.folder)))

    def on_rollback(self, step: int) -> None:
        """Forget what was measured after the step that training goes on from; metrics.jsonl has what is left."""
        self._since_line.clear()
        self._best = None
        for fields in read_steps(run_folder(self._config)):
            self._best = better_of(self._best, validation_of(fields))
        self._pace.on_rollback(step)

    def on_save_wait(self, seconds: float, *, goes_on: bool) -> None:
        """Count the time, which is not that of a step."""
        self._pace.on_save(seconds, goes_on=goes_on)
        self._show()

    def close(self, status: Status) -> None:
        """Log the last step and the summary, and remove the live line."""
        self._terminal.show("")
        if self._newest is None or status == "SUPERSEDED":
            return
        if self._since_line:
            self._log_step(self._newest)
        tokens = self._pace.samples_taken * self._config.data.sequence_length
        memory_gb, spent = self._newest.memory_gb, self._pace.spent()
        lines = closing_lines(
            steps=self._pace.steps_taken, tokens=tokens, spent=spent, memory_gb=memory_gb, best=self._best
        )
        for line in lines:
            logger.info("%s", line)

    def _log_step(self, result: StepResult) -> None:
        taken, seconds = [*self._since_line], sum(each.step_seconds for each in self._since_line)
        self._since_line.clear()
        # both of the same steps: with train.length_warmup their tokens cost differently
        speed = sum(each.tokens_per_second * each.step_seconds for each in taken) / seconds
        used = sum((each.model_flops_utilization or 0.0) * each.step_seconds for each in taken) / seconds
        result = replace(result, model_flops_utilization=used)
        steps, left = self._config.train.steps, self._pace.seconds_left
        columns = self._terminal.columns
        logger.info("%s", step_line(result, steps=steps, speed=speed, seconds_left=left, columns=columns))

    def _log_validation(self, result: StepResult, *, loss: float) -> None:
        self._best = better_of(self._best, Best(loss, result.step))
        for line in validation_lines(result, loss=loss, best=self._best):
            logger.info("%s", line)

    def _show(self, doing: str = "") -> None:
        columns = self._terminal.columns
        if columns is None or self._newest is None:
            return
        text = live_line(
            self._newest,
            steps=self._config.train.steps,
            speed=self._pace.tokens_per_second,
            seconds_left=self._pace.seconds_left,
            doing=doing,
            columns=columns,
        )
        self._terminal.show(text)


def _size_of(folder: Path) -> int:
    with suppress(OSError):  # a line of the log must not end training
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0
