"""Log lines of the launcher, before and after the ranks run; training/progress_log.py has those of a rank."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from configs.commands import typed_overrides, typed_path
from configs.errors import InputError
from configs.paths import logs_folder, rank_log, run_folder
from configs.schema import RunConfig
from configs.secrets import hide_secrets
from configs.terminal import Terminal
from launch.local import make_log_folder
from launch.machine import device_type
from launch.show.streams import following
from parallel.start import ProcessRank
from training.checkpoint.manifest import list_checkpoints
from training.incarnation import may_run
from training.metrics_file import last_reported_step
from training.metrics_reader import steps_before_first
from training.preflight import Ready, make_ready
from training.progress_lines import evaluate_line, lost_lines, start_lines

logger = logging.getLogger(__name__)


@contextmanager
def following_launcher(ready: Ready, *, device: str, environ: Mapping[str, str]) -> Iterator[None]:
    """Log what the launcher starts, on its terminal and in the run's log; both stay open while the block runs.

    Args:
        ready: The run, checked.
        device: Device type of the ranks: cpu or cuda.
        environ: Environment.
    Raises:
        MachineError: the folder of the logs cannot be made or written.
    """
    make_log_folder(logs_folder(ready.run_dir))
    with following(rank_log(logs_folder(ready.run_dir), rank=0), descriptor=None, environ=environ):
        _say_start(ready, device=device)
        yield


@contextmanager
def following_rank(config: RunConfig, process: ProcessRank, *, environ: Mapping[str, str]) -> Iterator[Terminal | None]:
    """Let rank 0 log the run's progress on the terminal and in the run's log, while the block runs.

    Under srun and torchrun, without our launcher, it logs the start and the end too.

    Args:
        config: The run.
        process: This process among the ranks.
        environ: Environment.
    Yields:
        The terminal; None on all ranks but the first, which have nothing to say.
    Raises:
        InputError: the run does not fit; found before the slow imports.
        MachineError: the folder of the logs cannot be made or written.
    """
    if process.rank:
        with following(None, descriptor=None, environ=environ):
            yield None
        return
    run_dir, ready, device = run_folder(config), None, device_type(environ)
    if process.starter != "local":
        ready = make_ready(config, world_size=process.world_size, device=device)
    logs = logs_folder(run_dir)
    make_log_folder(logs)
    with following(rank_log(logs, rank=0), descriptor=process.terminal, environ=environ) as terminal:
        if ready is not None:
            _say_start(ready, device=device)
        yield terminal
        if ready is not None:
            say_end(config, code=0, again="start the same job again")


def say_end(config: RunConfig, *, code: int, again: str) -> None:
    """Log what was lost, if the ranks failed or were ended before they could save, and what to type next.

    Log nothing after an error in the user's input, since the same command would fail again, or if a newer start is
    training, which owns the files.

    Args:
        config: The run.
        code: Exit code of the ranks; an error has been reported already.
        again: The command that continues the run.
    """
    run_dir = run_folder(config)
    newest = next(reversed(list_checkpoints(run_dir)), None)
    saved_step = newest.step if newest else 0
    if code == InputError.exit_code or (code and may_run(run_dir)):
        return
    if code and not run_dir.is_dir():  # moved while it ran
        logger.warning(
            "%s cannot be found, nor what was saved in it: move it back, or set run.dir to its place", run_dir
        )
        return
    if code:
        checkpoint, last_step = newest.path if newest else None, last_reported_step(run_dir)
        saved_step = saved_step or steps_before_first(run_dir)
        for line in lost_lines(last_step=last_step, checkpoint=checkpoint, saved_step=saved_step):
            logger.warning("%s", line)
    if saved_step >= config.train.steps:
        logger.info("%s", evaluate_line(run_dir))
    else:
        logger.info("to continue: %s", again)


def train_command_line(run: str, *, options: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the command that starts a run again, as a user types it, without secrets.

    Args:
        run: The run file as the user gave it.
        options: Options of `train`.
        overrides: Values of `--set`.
    """
    words = ["trainshort train", typed_path(run), *map(shlex.quote, options)]
    return hide_secrets(" ".join(words) + typed_overrides(overrides))


def verbosity_options() -> list[str]:
    """Return the options that give another process this process's verbosity."""
    level = logging.getLogger().level
    return ["--quiet"] if level > logging.INFO else ["--verbose"] if level < logging.INFO else []


def _say_start(ready: Ready, *, device: str) -> None:
    for line in start_lines(ready, device=device):
        logger.info("%s", line)
    logger.info("importing torch and DeepSpeed")
