"""Ask a run to stop, by a signal or a STOP file. All ranks save and end after the same step."""

import logging
import signal
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from configs.paths import stop_file
from parallel.axes import Group
from parallel.start import STOP_SIGNALS
from training.incarnation import Fence

logger = logging.getLogger(__name__)


class StopVerdict(IntEnum):
    """What a rank wants, in order of precedence: the maximum over all ranks decides."""

    GO_ON = 0
    STOP = 1
    SUPERSEDED = 2


class StopRequest:
    """This rank's request to stop.

    Attributes:
        asked: Whether this rank was asked to stop; other ranks may have been asked too.
    """

    def __init__(self) -> None:
        self.asked = False
        self._unannounced: int | None = None

    def ask(self) -> None:
        """Ask for a stop: all ranks then save and end after the same step, whichever rank was asked."""
        self.asked = True

    def listen(self, *, announce: bool = False) -> None:
        """Treat SIGTERM and SIGINT as requests from now on, including those that arrived while they were blocked.

        Args:
            announce: Whether `verdict` is to log the first one, where no launcher does. The handler logs
                nothing: the signal may have come while a line was being written.
        """

        def handle(number: int, _frame: Any) -> None:
            if announce and not self.asked:
                self._unannounced = number
            self.ask()

        for number in STOP_SIGNALS:
            signal.signal(number, handle)
        # Unblock last: a pending signal is delivered at once, and needs its handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def verdict(self, *, fence: Fence, reads_folder: bool) -> StopVerdict:
        """Return what this rank wants.

        Args:
            fence: Shows whether this start of the run is still the newest.
            reads_folder: Whether this rank looks for a STOP file and a newer start; one rank does it for all.
        """
        if self._unannounced is not None:
            logger.warning("asked by %s to stop", signal.Signals(self._unannounced).name)
            self._unannounced = None
        if reads_folder and not fence.may_be_ours():
            return StopVerdict.SUPERSEDED
        if self.asked or (reads_folder and stop_file(fence.run_dir).exists()):
            return StopVerdict.STOP
        return StopVerdict.GO_ON

    def any_rank_asked(self, *, fence: Fence, reads_folder: bool, world: Group, device: torch.device) -> bool:
        """Return whether any rank was asked to stop. A collective: ranks asked at different times stop together.

        Args:
            fence: As for `verdict`.
            reads_folder: As for `verdict`.
            world: All ranks.
            device: Device of this rank.
        Raises:
            Superseded: a newer start has taken over; raised on every rank.
        """
        worst = int(self.verdict(fence=fence, reads_folder=reads_folder))
        if world.size > 1:
            of_all = torch.tensor(worst, device=device)
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=world.handle)
            worst = int(of_all)
        return must_stop(worst, fence=fence)


def must_stop(verdict: int, *, fence: Fence) -> bool:
    """Return whether training stops by the verdict of all ranks.

    Raises:
        Superseded: a newer start has taken over.
    """
    if verdict == StopVerdict.SUPERSEDED:
        raise fence.superseded()
    return verdict == StopVerdict.STOP


def remove_stop_file(fence: Fence) -> None:
    """Remove the STOP file of a run that ends, so that its next start does not stop at once."""
    file = stop_file(fence.run_dir)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): the next start will stop at once", file, error.strerror)
