"""A shell command that is told of a run's events (`track.hook`): to send messages, or to copy checkpoints elsewhere.

Rank 0 tells of what happens while it trains. How training ended is told by who started the ranks, which may have been
killed: the local launcher, or the script of a SLURM job (launch/templates/job.sbatch.j2). Imports no torch.
"""

import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from configs.figures import counted, duration
from configs.paths import hook_log, run_folder
from configs.schema import RunConfig
from configs.terminal import Terminal
from parallel.die_with_parent import dying_with_parent
from parallel.start import environment, environment_beside_ranks
from training.checkpoint.manifest import CheckpointFolder, list_checkpoints
from training.followed_log import last_error
from training.incarnation import may_run
from training.observers import LOOK_SECONDS, BackgroundObserver, Save, Status, StepResult

logger = logging.getLogger(__name__)

EventName = Literal["started", "saved", "rolled_back", "finished", "stopped", "failed"]

ENDS_TOLD = "TRAINSHORT_ENDS_TOLD"
"""Variable of ranks whose starter tells how they ended."""

LAUNCHER_SECONDS = 60.0  # that the launcher, and a job's script, give the command
UNSAID_SECONDS = 1.0  # of them, before the launcher says that it waits
# That rank 0 gives it when training has ended. The last checkpoint may take long to copy; a failed rank is killed soon.
LAST_SECONDS: Mapping[Status, float] = {"FINISHED": 3600.0, "KILLED": 30.0, "FAILED": 5.0, "SUPERSEDED": 0.0}
_END_NAMES: Mapping[Status, EventName] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run.

    Attributes:
        name: What.
        message: The same for a person, in one line.
        step: The step after which it happened; of an end, that of the newest checkpoint.
        checkpoint: The checkpoint that was saved, else the newest one; None if there is none.
    """

    name: EventName
    message: str
    step: int
    checkpoint: Path | None

    def variables(self, config: RunConfig) -> dict[str, str]:
        """Return what the command finds in its environment."""
        return {
            "TRAINSHORT_EVENT": self.name,
            "TRAINSHORT_MESSAGE": f"{config.run.name}: {self.message}",
            "TRAINSHORT_RUN_NAME": config.run.name,
            "TRAINSHORT_RUN_DIR": str(run_folder(config).absolute()),
            "TRAINSHORT_STEP": str(self.step),
            "TRAINSHORT_CHECKPOINT": str(self.checkpoint.absolute()) if self.checkpoint else "",
        }


def end_event(config: RunConfig, name: EventName, *, why: str = "") -> RunEvent:
    """Return the event of a run that has ended.

    Args:
        config: The run.
        name: How.
        why: What went wrong, in one line.
    """
    newest = _newest(config)
    saved = f"the newest checkpoint is that of step {newest.step}" if newest else "nothing is saved"
    message = f"{name}, {saved}{f': {why}' if why else ''}"
    return RunEvent(name, message, newest.step if newest else 0, newest.path if newest else None)


class HookObserver(BackgroundObserver):
    """Runs the command at each event, one at a time, beside training. Only rank 0 has it.

    An event waits while the command runs for the one before. Retention keeps the checkpoints of saves that wait; of
    them only the newest does, so that a slow copy does not fill the disk.

    Args:
        config: The run; `track.hook` is set.
        step: The step that training continues from.
        ranks: How many train.
    """

    def __init__(self, config: RunConfig, *, step: int, ranks: int) -> None:
        self._config = config
        self._tells_end = ENDS_TOLD not in environment()
        self._running: tuple[RunEvent, subprocess.Popen[bytes]] | None = None
        self._waiting: deque[RunEvent] = deque()
        self._loss = self._saved_loss = float("nan")
        begins = f"started, from step {step + 1} to {config.train.steps} on {counted(ranks, 'rank')}"
        self._tell_beside_newest("started", begins, step=step)

    def on_step(self, result: StepResult) -> None:
        """See whether the command has ended, and run it for the event that waits."""
        self._loss = result.loss
        self._look()

    def before_save(self) -> None:
        """Remember the loss: one in the background ends some steps later."""
        self._saved_loss = self._loss

    def checkpoints_in_use(self) -> list[Path]:
        """Return the checkpoints of the saves that the command runs for, or that wait for it."""
        self._look()
        events = [*([self._running[0]] if self._running else []), *self._waiting]
        return [event.checkpoint for event in events if event.name == "saved" and event.checkpoint]

    def on_save(self, save: Save) -> None:
        """Tell of a checkpoint."""
        self._drop([event for event in self._waiting if event.name == "saved"], why="it still runs for another event")
        self._tell(RunEvent("saved", f"saved step {save.step}, loss {self._saved_loss:.4f}", save.step, save.folder))

    def on_rollback(self, step: int) -> None:
        """Tell that training has gone back."""
        gone = [event for event in self._waiting if event.name == "saved" and event.step > step]
        self._drop(gone, why="the checkpoint is removed")
        message = f"rolled back, training has diverged and goes on from step {step}"
        self._tell_beside_newest("rolled_back", message, step=step)

    def close(self, status: Status) -> None:
        """Tell how training ended unless its starter does; wait for the command here if `finish` will not."""
        self.training_finished = status == "FINISHED"
        if self._tells_end and status in _END_NAMES:
            self._tell(end_event(self._config, _END_NAMES[status]))
        if not self.training_finished:
            self._wait(seconds=LAST_SECONDS[status])

    def finish(self, *, asked: Callable[[], bool], terminal: Terminal) -> None:
        """Wait for the command, which may copy the last checkpoint."""
        self._wait(seconds=LAST_SECONDS["FINISHED"], asked=asked)

    def _wait(self, *, seconds: float, asked: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        self._look()
        if self._running and seconds:
            logger.info("training has ended: waiting for track.hook, for at most %s", duration(seconds))
        while self._running:
            if asked() or time.monotonic() >= deadline:
                event, process = self._running
                logger.warning("track.hook did not end at %r of step %d: killed", event.name, event.step)
                _kill(process)
                self._running = None
                self._drop([*self._waiting], why="it ran too long for another event")
                return
            time.sleep(LOOK_SECONDS)
            self._look()

    def _drop(self, events: Iterable[RunEvent], *, why: str) -> None:
        for event in events:
            logger.warning("track.hook is not run at %r of step %d: %s", event.name, event.step, why)
            self._waiting.remove(event)

    def _tell_beside_newest(self, name: EventName, message: str, *, step: int) -> None:
        newest = _newest(self._config)
        self._tell(RunEvent(name, message, step, newest.path if newest else None))

    def _tell(self, event: RunEvent) -> None:
        self._waiting.append(event)
        self._look()

    def _look(self) -> None:
        if self._running and (code := self._running[1].poll()) is not None:
            _report(self._config, self._running[0], code=code)
            self._running = None
        while self._waiting and not self._running:
            event = self._waiting.popleft()
            process = _start(self._config, event)
            self._running = (event, process) if process else None


def tell_end(config: RunConfig, *, code: int, stopped: bool) -> None:
    """Tell how ranks ended, and wait for the command for at most a minute. Nothing is told if a newer start trains.

    Args:
        config: The run.
        code: Their exit code.
        stopped: Whether a person ended them.
    """
    run_dir = run_folder(config)
    if config.track.hook is None or (code and may_run(run_dir)):
        return
    newest = _newest(config)
    is_complete = newest is not None and newest.step >= config.train.steps
    if code and not stopped:
        event = end_event(config, "failed", why=last_error(run_dir))
    else:
        event = end_event(config, "finished" if is_complete else "stopped")
    process = _start(config, event)
    if process is None:
        return
    try:
        _report(config, event, code=_code_of(process))
    except subprocess.TimeoutExpired:
        logger.warning("track.hook did not end at %r within %.0f s: killed", event.name, LAUNCHER_SECONDS)
    finally:
        if process.returncode is None:
            _kill(process)


def _code_of(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the command's end and return its exit code; say so if that is not at once."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(UNSAID_SECONDS)
    logger.info("waiting for track.hook")
    return process.wait(LAUNCHER_SECONDS)


def _newest(config: RunConfig) -> CheckpointFolder | None:
    return next(reversed(list_checkpoints(run_folder(config))), None)


def _start(config: RunConfig, event: RunEvent) -> "subprocess.Popen[bytes] | None":
    """Start the command, its output in a file; None, and a warning, if that fails. Its shell dies with this thread."""
    hook, log = config.track.hook, hook_log(run_folder(config))
    assert hook is not None
    try:
        with log.open("ab") as output:
            output.write(f"--- {datetime.now().isoformat(' ', 'seconds')} {event.message}\n".encode())
    except OSError:  # a full disk is what a run should tell of
        log = Path(os.devnull)
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                dying_with_parent("sh", "-c", hook),
                env={**environment_beside_ranks(environment()), **event.variables(config)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the ranks
            )
    except OSError as error:
        logger.warning("track.hook could not be run at %r of step %d: %s", event.name, event.step, error)
        return None


def _report(config: RunConfig, event: RunEvent, *, code: int) -> None:
    if code:
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        log = hook_log(run_folder(config))
        logger.warning("track.hook failed at %r of step %d (%s): see %s", event.name, event.step, how, log)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the command with what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
