"""Asking a run to stop: a signal sets a flag, and all ranks agree on the step after which they save and end."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether someone asked this job to end."""

    def __init__(self) -> None:
        self._asked = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests from now on."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def agreed(self, *, device: torch.device) -> bool:
        """Return whether any rank was asked; a collective, so that all ranks stop after the same step."""
        asked = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
