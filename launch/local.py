"""Start the ranks of one machine, forward signals to them, and report how they ended.

Torch is not imported: the launcher only starts Python processes, waits, and forwards signals. Each rank has its own
session, so that a terminal's Ctrl-C reaches only the launcher, and the kernel kills it when the launcher dies
(see parallel/die_with_parent.py). docs/decisions/0002 explains why this is not torchrun.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from configs.errors import MachineError
from configs.paths import rank_log
from launch.machine import core_count
from launch.rank_failure import ExplainMemory, Rank, cause_of, explain
from launch.stop_signals import stop_signals_handled
from parallel.die_with_parent import dying_with_parent
from parallel.start import rank_threads
from training.host_memory import oom_kills

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.01  # shorter than what a rank takes to end after it has lost another one
# Ranks write to the file they meet in during a save too, which must not fail there because the disk is full.
MEMORY = "/dev/shm"
STOPPED_BY_HAND = 130  # 128 + SIGINT, as in a shell


@dataclass
class Signals:
    """State that the launcher's signal handlers keep.

    Attributes:
        metrics: File that rank 0 replaces before its first step.
        metrics_before: Its version when the launcher started.
        ranks: The ranks to forward to; empty while they are being started.
        asked: Requests to stop so far.
        killed: Whether the user forced the ranks to end.
        unannounced: Signal of a request that no line tells of yet; None if there is none.
    """

    metrics: Path
    metrics_before: tuple[int, int] | None
    ranks: list[Rank] = field(default_factory=list)
    asked: int = 0
    killed: bool = False
    unannounced: int | None = None

    def handle(self, number: int, _frame: Any) -> None:
        """Forward a request to stop to the ranks, which save and end; a second Ctrl-C kills them.

        Logs nothing: the signal may have come while a line was being written.
        """
        self.asked += 1
        if number == signal.SIGINT and self.asked > 1:
            self.killed, self.unannounced = True, None
            kill(self.ranks)
            return
        ask_to_stop(self.ranks)
        self.unannounced = number

    def announce(self) -> None:
        """Log a new request; the ranks learn of it only after the step or the import that they are in."""
        if self.unannounced is None:
            return
        number, self.unannounced = self.unannounced, None
        how = "press again" if number == signal.SIGINT else f"asked by {signal.Signals(number).name}; press Ctrl-C"
        has_begun = _version(self.metrics) != self.metrics_before  # before the first step there is nothing to save
        first, last = ("saving", "end without saving") if has_begun else ("stopping", "end at once")
        logger.warning("%s, %s to %s", first, how, last)


def start_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environ: Mapping[str, str],
    metrics: Path,
    explain_memory: ExplainMemory,
    results: TextIO | None = None,
    grace_seconds: float = 10.0,
) -> int:
    """Run a command once per rank, wait until all have ended, and return one exit code.

    The output of rank N is appended to logs/rank_N.log; rank 0 gets the launcher's standard error too, for progress.
    Ctrl-C, SIGTERM and SIGHUP are forwarded to all ranks as SIGTERM, and the ranks may take as long as they need.

    Args:
        command: Program and arguments, the same for all ranks.
        ranks: Number of ranks to start.
        logs: Folder of the log files.
        environ: Environment of the ranks; each rank's number and the rendezvous are added.
        metrics: File that rank 0 replaces before its first step.
        explain_memory: Makes the message about a rank that ran out of memory.
        results: Where rank 0's standard output goes; None for its log.
        grace_seconds: How long the others may take to end after a rank has failed, and again after SIGTERM.
    Raises:
        MachineError: the folder of the logs cannot be created or written.
    Returns:
        0 if all ranks ended well; 2 or 3 if a rank ended with that code; 3 if one was killed; 130 if they were stopped
        and could not save; otherwise 1.
    """
    make_log_folder(logs)
    kills_before = oom_kills()
    with _meeting_folder() as folder, _terminal() as terminal, _forwarding(metrics) as signals:
        shared = _shared_environment(environ, ranks=ranks, folder=Path(folder))
        begin = partial(_start, command, logs=logs, environ=shared, terminal=terminal, results=results)
        started: list[Rank] = []
        try:
            for number in range(ranks):
                started.append(begin(number=number))
            signals.ranks = started
            if signals.asked:  # a signal came while they were being started
                ask_to_stop(started)
            failed = _wait(started, grace_seconds=grace_seconds, on_poll=signals.announce)
        finally:
            kill(started)
    if signals.killed or (signals.asked and failed and failed.code in (-signal.SIGTERM, STOPPED_BY_HAND)):
        return STOPPED_BY_HAND  # killed by force, stopped before there was anything to save, or says so itself
    return explain(failed, kills_before=kills_before, explain_memory=explain_memory) if failed else 0


def _meeting_folder() -> "tempfile.TemporaryDirectory[str]":
    in_memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="trainshort-", dir=in_memory)


@contextlib.contextmanager
def _terminal() -> Iterator[int]:
    """Yield a file descriptor of standard error that rank 0 inherits."""
    terminal = os.dup(sys.stderr.fileno())
    try:
        yield terminal
    finally:
        os.close(terminal)


def _shared_environment(environ: Mapping[str, str], *, ranks: int, folder: Path) -> dict[str, str]:
    """Return the part of the ranks' environment that is the same for all; they meet in a folder."""
    meeting = {"TRAINSHORT_RANKS": str(ranks), "TRAINSHORT_RENDEZVOUS": str(folder / "rendezvous")}
    return {"OMP_NUM_THREADS": rank_threads(cores=core_count(), ranks=ranks), **environ, **meeting}


def make_log_folder(logs: Path) -> None:
    """Make the folder of the ranks' logs.

    Raises:
        MachineError: it cannot be made or written.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {logs} cannot be made ({error.strerror}): choose another run.dir") from None
    if not os.access(logs, os.W_OK):
        raise MachineError(f"folder {logs} cannot be written: fix its permissions, or choose another run.dir")


def _version(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced; None if there is no file."""
    with contextlib.suppress(OSError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def ask_to_stop(ranks: Sequence[Rank]) -> None:
    """Send SIGTERM to each running rank, but not to its helper processes: it may need them to save."""
    for rank in ranks:
        rank.process.send_signal(signal.SIGTERM)


def kill(ranks: Sequence[Rank]) -> None:
    """Kill each running rank with its helper processes."""
    for rank in ranks:
        if rank.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _forwarding(metrics: Path) -> Iterator[Signals]:
    signals = Signals(metrics, _version(metrics))
    with stop_signals_handled(signals.handle):
        yield signals


def _start(
    command: Sequence[str],
    *,
    number: int,
    logs: Path,
    environ: Mapping[str, str],
    terminal: int,
    results: TextIO | None,
) -> Rank:
    log = rank_log(logs, rank=number)
    log_start = log.stat().st_size if log.exists() else 0
    try:
        output = log.open("ab")
    except OSError as error:
        raise MachineError(
            f"{log} cannot be written ({error.strerror}): remove it, or choose another run.dir"
        ) from None
    with output:
        process = subprocess.Popen(
            dying_with_parent(*command),
            env={
                **environ,
                "TRAINSHORT_RANK": str(number),
                **({} if number else {"TRAINSHORT_TERMINAL": str(terminal)}),
            },
            stdin=subprocess.DEVNULL,
            stdout=output if number or results is None else results,
            stderr=output,
            pass_fds=() if number else (terminal,),
            start_new_session=True,
        )
    return Rank(number=number, process=process, log=log, log_start=log_start)


def _wait(ranks: Sequence[Rank], *, grace_seconds: float, on_poll: Callable[[], None]) -> Rank | None:
    """Wait for all ranks, stop the others once one has failed, and return the rank that caused the failure, if any."""
    failed: list[Rank] = []
    killed: list[Rank] = []
    deadline, asked = float("inf"), False
    while True:
        running = [rank for rank in ranks if rank.process.poll() is None]
        on_poll()
        failed += [rank for rank in ranks if rank.process.returncode and rank not in failed]
        if not asked:  # stop looking once asked: the launcher's own SIGTERM ends ranks too
            killed = [rank for rank in failed if rank.process.returncode < 0]
        if not running:
            return cause_of(failed, killed=killed)
        now = time.monotonic()
        if failed and deadline == float("inf"):
            deadline = now + grace_seconds
        if now >= deadline:
            stop = kill if asked else ask_to_stop
            stop(running)
            deadline, asked = now + grace_seconds, True
        time.sleep(POLL_SECONDS)
