"""Asking a run to stop: by a signal or a STOP file; all ranks agree on the step after which they save and end."""

import logging
import signal
from types import FrameType

import torch
import torch.distributed as dist

from configs.paths import stop_file
from parallel.start import STOP_SIGNALS
from training.incarnation import Fence

logger = logging.getLogger(__name__)

_GO_ON, _STOP, _SUPERSEDED = range(3)


class StopRequest:
    """Whether someone asked this job to end, or started it anew elsewhere."""

    def __init__(self) -> None:
        self._asked = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests from now on, also those that were held until now."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def agreed(self, *, fence: Fence, looks: bool, device: torch.device) -> bool:
        """Return whether any rank was asked; a collective, so that all ranks stop after the same step.

        Args:
            fence: Tells whether this start of the run is still the newest.
            looks: Whether this rank looks into the run folder for the others.
            device: Of this rank.
        Raises:
            Superseded: a newer start has taken over; raised on every rank.
        """
        seen = _STOP if self._asked else _GO_ON
        if looks:
            seen = max(seen, _STOP if stop_file(fence.run_dir).exists() else _GO_ON)
            seen = _SUPERSEDED if not fence.may_be_ours() else seen
        worst = torch.tensor(seen, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) == _SUPERSEDED:
            raise fence.superseded()
        return int(worst) == _STOP

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def obey_stop_file(fence: Fence) -> None:
    """Remove the STOP file of a run that has saved and ends, so that the next start goes on."""
    file = stop_file(fence.run_dir)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): the next start will stop at once", file, error.strerror)
