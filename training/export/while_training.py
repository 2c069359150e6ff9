"""Export checkpoints while a run trains (`checkpoint.export_every`), in a process of its own. Imports no torch.

Rank 0 starts `trainshort export` once a checkpoint is on disk and goes on at once: a save takes a process start longer.
One export runs at a time, on one thread of the CPU and with the lowest priority. An export that fails is a warning.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from configs.commands import command_here, typed_path
from configs.errors import InputError
from configs.figures import duration
from configs.files import move_aside
from configs.paths import run_folder, step_export_folder, step_export_log
from configs.schema import RunConfig
from configs.terminal import Terminal
from parallel.die_with_parent import dying_with_parent
from parallel.start import environment, environment_beside_ranks
from training.checkpoint.manifest import list_checkpoints
from training.export.folder import remove_partial_folders
from training.export.formats.table import FORMATS
from training.incarnation import Fence
from training.observers import LOOK_SECONDS, BackgroundObserver, Save, Status, StepResult

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = 19
FIRST_VICTIM = "1000"  # of the kernel, where memory runs out: never a rank


def check_export_every(config: RunConfig) -> None:
    """Refuse, before training, exports during training that could not be made.

    Raises:
        InputError: the format is not known, or cannot hold the model.
    """
    rules = config.checkpoint
    if rules.export_format not in FORMATS:
        known = " or ".join(FORMATS)
        raise InputError(f"checkpoint.export_format {rules.export_format!r} is not known: use {known}")
    problem = FORMATS[rules.export_format].problem_of(config.model) if rules.export_every else None
    if problem is not None:
        what = problem.rpartition(": ")[0]  # what follows is advice on `trainshort export`
        others = (name for name, row in FORMATS.items() if row.problem_of(config.model) is None)
        advice = "".join(f"checkpoint.export_format to {name}, " for name in others)
        raise InputError(
            f"{what}: set {advice}checkpoint.export_every ({rules.export_every}) to 0, or change the model"
        )


class ExportProcess(Protocol):
    """A process that exports; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        ...


def start_export(command: Sequence[str], log: Path) -> ExportProcess:
    """Start a command with the lowest priority, without a GPU, its output in a file. It dies with this thread.

    Raises:
        OSError: the file cannot be written, or no process can be started.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            dying_with_parent(*command),
            env=environment_beside_ranks(environment()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for the ranks, which end it
        )
    # Set from here: a preexec_fn would run Python in a fork of a rank, and be slow where the rank is large.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        Path(f"/proc/{process.pid}/oom_score_adj").write_text(FIRST_VICTIM, encoding="ascii")
    return process


@dataclass(frozen=True)
class _Export:
    """One export: of which step and checkpoint, to which folder, with its output in which file."""

    step: int
    checkpoint: Path
    out: Path
    log: Path


@dataclass(frozen=True)
class _RunningExport:
    export: _Export
    process: ExportProcess
    began: float


class ExportsWhileTraining(BackgroundObserver):
    """Exports each `export_every`-th checkpoint, and that of the last step. Only rank 0 has it.

    The newest checkpoint waits for the export that runs; an older one that waits gives way. Retention removes neither
    of the two. This is remembered nowhere else, so no checkpoint is kept for an export that was killed.

    Args:
        config: The run; `export_every` is not 0.
        fence: Shows whether this start of the run is still the newest.
        start: Starts a command with its output in a file.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        fence: Fence,
        start: Callable[[Sequence[str], Path], ExportProcess] = start_export,
    ) -> None:
        self._rules, self._last_step, self._run_dir = config.checkpoint, config.train.steps, run_folder(config)
        self._fence = fence
        self._start = start
        self._running: _RunningExport | None = None
        self._waiting: _Export | None = None

    def resume(self, step: int) -> None:
        """Remove what killed exports left, and export the newest checkpoint that is due and was not exported.

        Exports of later steps are renamed, as these are taken again.

        Args:
            step: The step that training continues from.
        """
        self._remove_partial_folders()
        self._rename_later(step)
        due = [each for each in list_checkpoints(self._run_dir) if each.step <= step and self._is_due(each.step)]
        if due and not step_export_folder(self._run_dir, step=due[-1].step).exists():
            self._ask_for(due[-1].step, due[-1].path)

    def on_step(self, result: StepResult) -> None:
        """See whether the export has ended."""
        self._look()

    def checkpoints_in_use(self) -> list[Path]:
        """Return the checkpoints that are exported or wait for it."""
        self._look()
        running = None if self._running is None else self._running.export
        return [export.checkpoint for export in (running, self._waiting) if export is not None]

    def on_save(self, save: Save) -> None:
        """Export the checkpoint if it is due."""
        if self._is_due(save.step):
            self._ask_for(save.step, save.folder)

    def on_rollback(self, step: int) -> None:
        """End the exports of later steps, and rename those that are done: the steps are taken again."""
        self._look()
        if self._running is not None and self._running.export.step > step:
            self._end()
        if self._waiting is not None and self._waiting.step > step:
            self._waiting = None
        self._rename_later(step)

    def _rename_later(self, step: int) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for out in step_export_folder(self._run_dir, step=0).parent.glob("step-" + 8 * "[0-9]"):
            if int(out.name.removeprefix("step-")) > step:
                logger.warning(
                    "%s is of a step that is taken again: renamed to %s", out, move_aside(out, date=now).name
                )

    def close(self, status: Status) -> None:
        """End the export unless training has finished: `finish` then waits for it."""
        self.training_finished = status == "FINISHED"
        ended = None if self.training_finished else self._end()
        if ended is not None:
            logger.info("the export of step %d is left to the next start", ended.step)

    def finish(self, *, asked: Callable[[], bool], terminal: Terminal) -> None:
        """Wait for the exports that are left."""
        self._look()
        if self._running is not None:
            newest = self._waiting or self._running.export
            logger.info("training has ended: waiting for the export of step %d", newest.step)
        while self._running is not None:
            if asked():
                break
            seconds = time.monotonic() - self._running.began
            terminal.show(f"exporting step {self._running.export.step}: {duration(seconds)}")
            time.sleep(LOOK_SECONDS)
            self._look()
        terminal.show("")
        ended = self._end()
        if ended is not None:
            paths = f"{typed_path(ended.checkpoint)} --out {typed_path(ended.out)}"
            command = f"`trainshort export --format {self._rules.export_format} {paths}`"
            logger.warning("stopped: step %d is not exported; %s does it", ended.step, command)

    def _is_due(self, step: int) -> bool:
        return step % self._rules.export_every == 0 or step == self._last_step

    def _ask_for(self, step: int, checkpoint: Path) -> None:
        """Export a checkpoint, now or after the one that runs."""
        self._look()
        out, log = (make(self._run_dir, step=step) for make in (step_export_folder, step_export_log))
        if os.path.lexists(out):
            logger.info("step %d is not exported again: %s exists", step, out)
            return
        export = _Export(step, checkpoint, out, log)
        if self._running is None:
            self._begin(export)
            return
        if self._waiting is not None:
            dropped, running = self._waiting.step, self._running.export.step
            logger.warning("step %d is not exported: step %d still is, and step %d is next", dropped, running, step)
        self._waiting = export

    def _begin(self, export: _Export) -> None:
        options = ["--format", self._rules.export_format, "--out", str(export.out)]
        try:
            process = self._start(command_here("export", *options, "--", str(export.checkpoint)), export.log)
        except OSError as error:
            logger.warning("step %d was not exported: no process can be started (%s)", export.step, error.strerror)
            return
        self._running = _RunningExport(export, process, time.monotonic())

    def _look(self) -> None:
        """Report the export that runs if it has ended, and start the one that waits."""
        if self._running is None:
            return
        export, code = self._running.export, self._running.process.poll()
        if code is None:
            return
        seconds = time.monotonic() - self._running.began
        self._running = None
        if code == 0:
            logger.info("exported step %d to %s in %s", export.step, export.out, duration(seconds))
        else:
            self._remove_partial_folders()
            reason = _reason(export.log, code=code)
            logger.warning("step %d was not exported (%s): see %s", export.step, reason, export.log)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._begin(waiting)

    def _end(self) -> _Export | None:
        """End the export that runs, drop the one that waits, and return the newer of the two."""
        if self._running is None:
            return None
        newest = self._waiting or self._running.export
        self._running.process.kill()
        self._running.process.wait()
        self._running = self._waiting = None
        self._remove_partial_folders()
        return newest

    def _remove_partial_folders(self) -> None:
        if self._fence.may_be_ours():  # else a newer start may be exporting
            remove_partial_folders(step_export_folder(self._run_dir, step=0).with_name("step-*"))


def _reason(log: Path, *, code: int) -> str:
    """Return why an export failed: the last line of its output that is not a detail of the one before."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{', out of memory?' if code == -signal.SIGKILL else ''}"
    lines: list[str] = []
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    errors = [line.strip().removeprefix("error: ") for line in lines if line.strip() and not line.startswith("  ")]
    return errors[-1] if errors else f"exit code {code}"
