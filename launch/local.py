"""Start the ranks of one machine, forward signals to them, and report how they ended.

Torch is not imported: the launcher only starts Python processes, waits, and forwards signals. Each rank has its own
session, so that a terminal's Ctrl-C reaches only the launcher, and the kernel kills it when the launcher dies
(see launch/die_with_parent.py). docs/decisions/0002 explains why this is not torchrun.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from configs.errors import MachineError
from launch.machine import core_count
from launch.show.streams import write_error

POLL_SECONDS = 0.01  # shorter than what a rank takes to end after it has lost another one
TAIL_LINES = 20
# Ranks write to the file they meet in during a save too, which must not fail there because the disk is full.
MEMORY = "/dev/shm"
STOPPED_BY_HAND = 130  # 128 + SIGINT, as in a shell


@dataclass
class Rank:
    """One started rank.

    Attributes:
        number: Its rank, from 0.
        process: The process.
        log: File that its output goes to, or None for the terminal.
        log_start: Byte offset in the log at which this start's output begins.
    """

    number: int
    process: "subprocess.Popen[bytes]"
    log: Path | None
    log_start: int


@dataclass
class Signals:
    """State that the launcher's signal handlers keep.

    Attributes:
        ranks: The ranks to forward to; empty while they are being started.
        asked: Requests to stop so far.
        killed: Whether the user forced the ranks to end.
    """

    ranks: list[Rank] = field(default_factory=list)
    asked: int = 0
    killed: bool = False

    def handle(self, number: int, _frame: Any) -> None:
        """Forward a request to stop to the ranks, which save and end; a second Ctrl-C kills them."""
        self.asked += 1
        if number == signal.SIGINT and self.asked > 1:
            self.killed = True
            kill(self.ranks)
        else:
            ask_to_stop(self.ranks)


def start_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str],
    grace_seconds: float = 10.0,
) -> int:
    """Run a command once per rank, wait until all have ended, and return one exit code.

    Rank 0 writes to the launcher's terminal, the others append to logs/rank_N.log. Ctrl-C, SIGTERM and SIGHUP are
    forwarded to all ranks as SIGTERM, and the ranks may take as long as they need to save.

    Args:
        command: Program and arguments, the same for all ranks.
        ranks: Number of ranks to start.
        logs: Folder of the log files.
        environment: Environment of the ranks; each rank's number and the rendezvous are added.
        grace_seconds: After a rank has failed, how long the others may take to end by themselves, and then again
            after SIGTERM.
    Raises:
        MachineError: the folder of the logs cannot be created or written.
    Returns:
        0 if all ranks ended well; 2 or 3 if a rank ended with that code; 130 if they were stopped and could not save;
        otherwise 1.
    """
    _make_folder(logs)
    in_memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="trainshort-", dir=in_memory) as folder, _handled_signals() as signals:
        shared = {
            **environment,
            "TRAINSHORT_RANKS": str(ranks),
            "TRAINSHORT_RENDEZVOUS": str(Path(folder) / "rendezvous"),
        }
        shared.setdefault("OMP_NUM_THREADS", str(max(1, core_count() // ranks)))
        started: list[Rank] = []
        try:
            for number in range(ranks):
                started.append(_start(command, number=number, logs=logs, environment=shared))
            signals.ranks = started
            if signals.asked:  # a signal came while they were being started
                ask_to_stop(started)
            failed = _wait(started, grace_seconds=grace_seconds)
        finally:
            kill(started)
    if signals.killed or (signals.asked and failed and failed.process.returncode == -signal.SIGTERM):
        return STOPPED_BY_HAND  # killed by force, or stopped before there was anything to save
    return _explain(failed)


def _make_folder(logs: Path) -> None:
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {logs} cannot be made ({error.strerror}): choose another run.dir") from None
    if not os.access(logs, os.W_OK):
        raise MachineError(f"folder {logs} cannot be written: fix its permissions, or choose another run.dir")


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
def _handled_signals() -> Iterator[Signals]:
    signals = Signals()
    # nohup makes the launcher ignore SIGHUP: keep it ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], *, number: int, logs: Path, environment: Mapping[str, str]) -> Rank:
    # -I -S: the wrapper needs nothing from site-packages and starts faster without it.
    wrapper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("die_with_parent.py")), str(os.getpid())]
    log = logs / f"rank_{number}.log" if number else None
    log_start = log.stat().st_size if log and log.exists() else 0
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | None = stack.enter_context(log.open("ab")) if log else None
        process = subprocess.Popen(
            [*wrapper, *command],
            env={**environment, "TRAINSHORT_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
    return Rank(number=number, process=process, log=log, log_start=log_start)


def _wait(ranks: Sequence[Rank], *, grace_seconds: float) -> Rank | None:
    """Wait for all ranks, stop the others once one has failed, and return the rank that caused the failure, if any."""
    failed: list[Rank] = []
    killed: list[Rank] = []
    deadline, asked = float("inf"), False
    while True:
        running = [rank for rank in ranks if rank.process.poll() is None]
        failed += [rank for rank in ranks if rank.process.returncode and rank not in failed]
        if not asked:  # stop looking once asked: the launcher's own SIGTERM ends ranks too
            killed = [rank for rank in failed if rank.process.returncode < 0]
        if not running:
            # The cause is a rank that ended with 2 or 3 (input, machine), else one that was killed. The others fail
            # only because they lost their connection to it. If several ended with 2 or 3, the lowest rank is named:
            # rank 0 has already printed the error on the terminal.
            causes = [rank for rank in failed if rank.process.returncode in (2, 3)]
            return min(causes, key=lambda rank: rank.number) if causes else next(iter([*killed, *failed]), None)
        now = time.monotonic()
        if failed and deadline == float("inf"):
            deadline = now + grace_seconds
        if now >= deadline:
            stop = kill if asked else ask_to_stop
            stop(running)
            deadline, asked = now + grace_seconds, True
        time.sleep(POLL_SECONDS)


def _explain(failed: Rank | None) -> int:
    if failed is None:
        return 0
    code = failed.process.returncode
    if failed.log is None and code in (1, 2, 3):
        return int(code)  # rank 0 has printed its error on the terminal
    how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.Signals(-code).name})"
    message = f"error: rank {failed.number} ended with {how}"
    if failed.log:
        message += f"; the end of {failed.log}:\n" + _tail(failed.log, start=failed.log_start)
    write_error(f"{message}\n")
    return int(code) if code in (2, 3) else 1


def _tail(log: Path, *, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
