"""Ask a run to stop, by a signal or a STOP file. All ranks save and end after the same step."""

import logging
import signal
from typing import Any

import torch
import torch.distributed as dist

from configs.paths import stop_file
from parallel.start import STOP_SIGNALS
from training.incarnation import Fence

logger = logging.getLogger(__name__)

# in order of precedence: the maximum over all ranks decides
_GO_ON, _STOP, _SUPERSEDED = range(3)


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
            announce: Whether `any_rank_asked` is to log the first one, where no launcher does. The handler logs
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

    def any_rank_asked(self, *, fence: Fence, reads_folder: bool, device: torch.device) -> bool:
        """Return whether any rank was asked to stop. A collective: ranks asked at different times stop together.

        Args:
            fence: Shows whether this start of the run is still the newest.
            reads_folder: Whether this rank looks for a STOP file and a newer start; one rank does it for all.
            device: Device of this rank.
        Raises:
            Superseded: a newer start has taken over; raised on every rank.
        """
        if self._unannounced is not None:
            logger.warning("asked by %s to stop", signal.Signals(self._unannounced).name)
            self._unannounced = None
        verdict = _STOP if self.asked else _GO_ON
        if reads_folder:
            verdict = max(verdict, _STOP if stop_file(fence.run_dir).exists() else _GO_ON)
            verdict = verdict if fence.may_be_ours() else _SUPERSEDED
        worst = torch.tensor(verdict, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) == _SUPERSEDED:
            raise fence.superseded()
        return int(worst) == _STOP


def remove_stop_file(fence: Fence) -> None:
    """Remove the STOP file of a run that ends, so that its next start does not stop at once."""
    file = stop_file(fence.run_dir)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): the next start will stop at once", file, error.strerror)
