"""Who is told of each step. An observer lives on rank 0 and never changes training."""

import errno
import json
import logging
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from configs.files import whole_file
from configs.paths import logs_folder

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED", "SUPERSEDED"]

SOMETIMES = ("validation_loss", "failed_saves")  # not in every line
QUIET_SECONDS = 10.0  # between two lines of progress where the output is no terminal


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step, as it stands in metrics.jsonl.

    Attributes:
        loss: Mean over the global batch, nats per token.
        grad_norm: Global, before clipping.
        step_seconds: From the end of the step before to the end of this one.
        model_flops_utilization: Share of all ranks' peak; None where the peak is unknown.
        memory_gb: The largest rank's peak, 1e9 bytes: resident set on a CPU, allocated on a GPU.
        validation_loss: Mean over the held-out samples, in the steps that measured it.
        failed_saves: Checkpoints since the start that could not be saved; None where there is none.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_seen: int
    consumed_samples: int
    step_seconds: float
    tokens_per_second: float
    model_flops_utilization: float | None
    memory_gb: float
    validation_loss: float | None = None
    failed_saves: int | None = None

    def values(self) -> dict[str, float]:
        """Return what was measured, by name; the step itself is no measurement."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "step"}


class Observer(Protocol):
    """Is told of each step."""

    def on_step(self, result: StepResult) -> None:
        """Take note of a finished step."""
        ...

    def before_save(self) -> None:
        """Make what was told safe: a checkpoint that follows it is about to be saved."""
        ...

    def close(self, status: Status) -> None:
        """Release what it holds; training has ended, and how."""
        ...


class MetricsFile:
    """metrics.jsonl: one object a step, each step once."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Open the file after `last_step`; later or torn lines of a broken run are moved to logs/."""
        path = run_dir / "metrics.jsonl"
        # Whatever a power cut left there is no line.
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if _is_step_up_to(line, last_step)]
        if len(kept) < len(lines):
            logs_folder(run_dir).mkdir(exist_ok=True)
            with (logs_folder(run_dir) / "metrics_discarded.jsonl").open("a", encoding="utf-8") as discarded:
                discarded.writelines(line for line in lines if not _is_step_up_to(line, last_step))
        # A new file each time: what an older start still appends goes to the old one, which nobody sees.
        # Opened before it gets its name, so that it is not that of a start that is newer still.
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
            self._path, self._handle = path, os.open(temporary, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size
        self._waiting = b""

    def on_step(self, result: StepResult) -> None:
        """Append one line; while the disk is full, lines wait in memory."""
        known = {name: value for name, value in asdict(result).items() if name not in SOMETIMES or value is not None}
        warned = bool(self._waiting)
        self._waiting += json.dumps(known).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not warned:
                logger.error("%s cannot be written (%s): its lines wait in memory", self._path, error.strerror)

    def before_save(self) -> None:
        """Wait until the disk has the lines: a resume from the checkpoint could not make up for lost ones."""
        with suppress(OSError):  # on_step has said that the disk is full; the save will say so too
            self._write()
            os.fsync(self._handle)

    def close(self, status: Status) -> None:
        """Close the file."""
        with suppress(OSError):
            self._write()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            logger.error("%s lacks its last %d lines: the disk did not take them", self._path, lines)
        os.close(self._handle)

    def _write(self) -> None:
        os.ftruncate(self._handle, self._size)  # what was cut short by a full disk
        written = os.write(self._handle, self._waiting)
        if written < len(self._waiting):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._waiting = self._size + written, b""


def _is_step_up_to(line: str, last_step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= last_step
    except (ValueError, KeyError, TypeError):
        return False


class ProgressLine:
    """What a person sees: a live line on a terminal, a plain line now and then in a log file."""

    def __init__(self, headline: str, *, first_step: int, steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
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
        self._console.print(headline, markup=False, soft_wrap=True)
        self._progress.start()

    def on_step(self, result: StepResult) -> None:
        """Show the step's figures; where they go may be full, or closed."""
        with suppress(OSError):
            self._show(result)

    def _show(self, result: StepResult) -> None:
        figures = describe(result)
        self._progress.update(self._task, completed=result.step, figures=figures)
        late = time.monotonic() - self._printed_at > QUIET_SECONDS or result.step == self._steps
        if not self._console.is_terminal and late:
            self._printed_at = time.monotonic()
            left = (self._steps - result.step) * result.step_seconds
            self._console.print(f"step {result.step}/{self._steps}  {figures}  {left:.0f} s left", soft_wrap=True)

    def before_save(self) -> None:
        """Keep nothing."""

    def close(self, status: Status) -> None:
        """Leave the line as it is."""
        with suppress(OSError):
            self._progress.stop()


def describe(result: StepResult) -> str:
    """Return a step's figures in one line."""
    parts = [f"loss {result.loss:.3f}", f"{result.tokens_per_second:,.0f} tokens/s"]
    if result.model_flops_utilization is not None:
        parts.append(f"utilization {result.model_flops_utilization:.0%}")
    parts.append(f"{result.memory_gb:.1f} GB")
    if result.validation_loss is not None:
        parts.append(f"validation {result.validation_loss:.3f}")
    return "  ".join(parts)
