"""Say why local ranks failed: by the error of the rank that caused it, from its log."""

import logging
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from configs.errors import InputError, LostPeers, MachineError
from configs.figures import byte_size, duration
from configs.secrets import hide_secrets
from launch.show.streams import write_error
from training.host_memory import OomKills, host_limit, oom_kills
from training.out_of_memory import DETAIL, is_out_of_memory_text

SHOWN_LINES = 20
READ_BYTES = 20_000
_ERROR, _TRACEBACK = "error: ", "Traceback (most recent call last):"
_REPORTED_CODES = (InputError.exit_code, MachineError.exit_code)
# What torch logs before it aborts a rank that waited in a collective of NCCL; the end of the log are its C++ frames.
_GAVE_UP = re.compile(r"collective operation timeout: .*?OpType=(\w+).* ran for (\d+) milliseconds")

ExplainMemory = Callable[[int, str], str]
"""Function from a rank and what happened to it to the message about a rank that ran out of memory."""


@dataclass
class Rank:
    """One started rank.

    Attributes:
        number: Its rank, from 0.
        process: The process.
        log: File that its output goes to.
        log_start: Byte offset in the log at which this start's output begins.
    """

    number: int
    process: "subprocess.Popen[bytes]"
    log: Path
    log_start: int

    @property
    def code(self) -> int:
        """Exit code of a rank that has ended, or minus the signal that ended it."""
        return self.process.wait()

    def last_lines(self) -> list[str]:
        """Return the end of its output; nothing if the log is gone."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(self.log_start, self.log.stat().st_size - READ_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
        return []


def cause_of(failed: Sequence[Rank], *, killed: Sequence[Rank]) -> Rank | None:
    """Return the rank that failed on its own account: the others fail because they lost their connection to it.

    Args:
        failed: Ranks that ended with an error, the first one first.
        killed: The failed ranks that a signal ended which the launcher had not sent.
    """
    refused = [rank for rank in failed if rank.code in _REPORTED_CODES]
    if refused:  # all ranks raise some errors together
        return min(refused, key=lambda rank: rank.number)
    # A rank that waits in vain may be aborted by NCCL.
    shot = [rank for rank in killed if rank.code != -signal.SIGABRT]
    own = [rank for rank in failed if rank in killed or (rank.code > 0 and rank.code != LostPeers.exit_code)]
    return next(iter([*shot, *own, *failed]), None)


def explain(rank: Rank, *, kills_before: OomKills, explain_memory: ExplainMemory) -> int:
    """Write why the ranks failed, and return the launcher's exit code.

    Args:
        rank: The rank that caused it.
        kills_before: Processes that the kernel had killed for lack of memory before the start.
        explain_memory: Makes the message about a rank that ran out of memory.
    """
    lines = rank.last_lines()
    code = rank.code if rank.code in _REPORTED_CODES else 1
    is_enough = True
    if (how := _lack_of_memory(rank, lines, kills_before=kills_before)) is not None:
        shown, code = [f"error: {explain_memory(rank.number, how)}"], MachineError.exit_code
    elif shown := _reported_error(rank, lines):
        pass
    elif rank.code == -signal.SIGABRT and (gave_up := _GAVE_UP.search("\n".join(lines))) is not None:
        waited = duration(int(gave_up[2]) / 1000)
        shown = [
            f"error: rank {rank.number} waited {waited} for the other ranks in a collective ({gave_up[1]}) and gave "
            "up: one of them hangs, or the network between them",
            f"  the rank that hangs is the one whose log ends otherwise, beside {rank.log}",
        ]
    elif rank.code == 1 and _TRACEBACK in lines:
        shown = [
            f"error: rank {rank.number} failed, which is a bug in trainshort: {_exception(lines)}",
            f"  please report it with the whole traceback, in {rank.log}",
        ]
    else:
        shown, is_enough = [f"error: rank {rank.number} ended with {_ending(rank.code)}"], False
    if not is_enough or logging.getLogger().isEnabledFor(logging.DEBUG):
        shown[-1] += f"; the end of {rank.log}:"
        shown += [f"  {line}" for line in lines[-SHOWN_LINES:]]
    write_error("".join(f"{line}\n" for line in shown))
    return code


def _lack_of_memory(rank: Rank, lines: Sequence[str], *, kills_before: OomKills) -> str | None:
    """Say how a rank ended that was killed or aborted, if that was or may have been for lack of memory."""
    kills = oom_kills()
    if rank.code == -signal.SIGABRT and is_out_of_memory_text("\n".join(lines)):
        how = "ran out of memory and was aborted, with signal 6 (SIGABRT)"
    elif rank.code != -signal.SIGKILL:
        return None
    elif _has_risen(kills_before.here, kills.here):
        how = "ran out of memory: the kernel killed it, with signal 9 (SIGKILL)"
    elif None in (kills_before.anywhere, kills.anywhere) or _has_risen(kills_before.anywhere, kills.anywhere):
        how = "ended with signal 9 (SIGKILL), most likely from the kernel, for lack of memory"
    else:
        how = (
            f"ended with signal 9 (SIGKILL), which the launcher did not send{DETAIL}the kernel counts no kill for lack "
            "of memory: a person did it, a scheduler, or a guard of the memory"
        )
    # After the last rank has ended, the kernel tells no more than this.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return DETAIL.join([how, f"held: {byte_size(peak)} at most, by the largest rank", f"limit: {host_limit()}"])


def _has_risen(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now > before


def _reported_error(rank: Rank, lines: Sequence[str]) -> list[str]:
    """Return the error that a rank has written last, naming the rank; nothing if it ended in another way."""
    starts = [number for number, line in enumerate(lines) if line.startswith(_ERROR) or line == _TRACEBACK]
    if rank.code < 0 or not starts or lines[starts[-1]] == _TRACEBACK:
        return []
    first, *more = lines[starts[-1] :]
    message = first.removeprefix(_ERROR)
    is_named = rank.number == 0 or message.startswith(f"rank {rank.number} ")
    return [_ERROR + (message if is_named else f"rank {rank.number}: {message}"), *takewhile(_is_indented, more)]


def _exception(lines: Sequence[str]) -> str:
    """Return the line of the last traceback that names the exception."""
    after = lines[len(lines) - lines[::-1].index(_TRACEBACK) :]
    return hide_secrets(next((line for line in after if line and not _is_indented(line)), lines[-1]))


def _is_indented(line: str) -> bool:
    return line.startswith("  ")


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code} ({signal.Signals(-code).name})"
