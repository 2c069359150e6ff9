"""What all ranks learn of a step, in one collective: its figures, and whether one asks to stop.

A GPU works on a queue, which must not run empty between two steps. So nothing here waits for it but `read`, which is
called when the next step is in the queue too.
"""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axes import Groups
from parallel.engine import StepOutcome
from training.energy import ReadAhead, counter_of, open_nvml
from training.incarnation import Fence
from training.model.windows import LosslessWindows
from training.stopping import StopRequest, StopVerdict

Instant = Any  # seconds; on a GPU, an event in its queue

_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class StepFigures:
    """A step, the same on every rank but for the time.

    Attributes:
        loss: Mean over the global batch, nats per token.
        grad_norm: Global, before clipping.
        memory_gb: Peak of the rank with the largest, in 1e9 bytes.
        verdict: Whether a rank asks to stop.
        saving: Whether a rank still writes its part of a save in the background.
        attention_density: Mean share of the causal score blocks that attention computed; None if no kernel counts them.
        energy_joules: Energy of all ranks' GPUs since the step before; None if a driver reports none.
        seconds: Time of the step on this rank's device.
    """

    loss: float
    grad_norm: float
    memory_gb: float
    verdict: int
    saving: bool
    attention_density: float | None
    energy_joules: float | None
    seconds: float


@dataclass(frozen=True)
class SentFigures:
    """A step that this rank's device may not have finished.

    Attributes:
        rows: Each rank's loss, gradient norm, memory, verdict, saving (1 or 0), sum of its attention's densities,
            their number, and joules, [world, 8] fp32, on the CPU; filled when the step ends.
        began, ended: From `mark_time`.
    """

    rows: Tensor
    began: Instant
    ended: Instant


class FigureExchange:
    """Gathers each step's figures from all ranks.

    Args:
        groups: This rank's places.
        device: This rank's device.
        stop: Shows whether this rank was asked to stop.
        fence: Shows whether this start of the run is still the newest.
        windows: Lossless windows of this rank's attention; None if it has none.
        is_saving: Returns whether this rank still writes its part of a save in the background.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        device: torch.device,
        stop: StopRequest,
        fence: Fence,
        windows: LosslessWindows | None,
        is_saving: Callable[[], bool],
    ) -> None:
        self._world, self._device = groups.world, device
        self._stop, self._fence, self._windows, self._is_saving = stop, fence, windows, is_saving
        self._last_stage = groups.data.size * groups.tensor.size  # its ranks are the world's last, and have the loss
        # Memory, verdict, saving. A GPU reads them at the end of a step, so a signal that comes during it still counts.
        # The steps in the queue share them: all ranks read the same row, so it does not matter which step's it is.
        self._own = torch.zeros(3, pin_memory=device.type == "cuda")

        self._energy = _read_energy(device)

    def begin(self) -> Instant:
        """Return when a step begins; what attention computed before, in a validation say, is not the step's."""
        self._densities()
        return mark_time(self._device)

    def send(self, outcome: StepOutcome, *, began: Instant) -> SentFigures:
        """Put the exchange of a step's figures into the device's queue; every rank must call it.

        Args:
            outcome: This rank's result.
            began: When the step began, from `begin`.
        """
        self._own[2] = self._is_saving()
        self._own[0] = _peak_memory_gb(self._device)
        if self._device.type != "cuda":  # a GPU's is renewed while it computes
            self._write_verdict()
        own = self._own.to(self._device, non_blocking=True)
        densities = self._densities()
        rows = torch.stack([outcome.loss.float(), outcome.grad_norm.float(), *own, *densities, self._joules()])[None]
        if self._world.size > 1:
            mine, rows = rows, rows.new_empty(self._world.size, rows.shape[1])
            dist.all_gather_into_tensor(rows, mine, group=self._world.handle)
        # the copy first: the event says that it is there
        return SentFigures(rows.to("cpu", non_blocking=True), began, mark_time(self._device))

    def read(self, sent: SentFigures) -> StepFigures:
        """Wait for a step and return its figures."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            self._write_verdict()
            while not sent.ended.query():
                self._own[2] = self._is_saving()
                time.sleep(_POLL_SECONDS)  # and not `synchronize`, during which Python runs no signal handler
                if self._stop.asked and self._own[1] == StopVerdict.GO_ON:
                    self._own[1] = StopVerdict.STOP
        _, grad_norm, memory_gb, verdict, saving, *_ = sent.rows.amax(dim=0).tolist()  # nan wins
        loss = sent.rows[-self._last_stage :, 0].double().mean().item()
        density, calls, joules = sent.rows[:, 5:].double().sum(0).tolist()
        attention_density = density / calls if calls else None  # all ranks have equally many heads
        seconds = sent.began.elapsed_time(sent.ended) / 1000 if on_gpu else sent.ended - sent.began
        energy_joules = joules if math.isfinite(joules) else None
        return StepFigures(
            loss, grad_norm, memory_gb, int(verdict), bool(saving), attention_density, energy_joules, seconds
        )

    def _joules(self) -> Tensor:
        """Return the energy of this rank's GPU since the last time, a scalar; nan if the driver does not tell.

        It is taken when the step is put into the queue, so what a step spends is the next one's; the sum is right.
        """
        joules = None if self._energy is None else self._energy.take()
        # filled by a kernel: steps in the queue must not share it, or one's energy would be lost
        return torch.full((), math.nan if joules is None else joules, device=self._device)

    def _densities(self) -> Tensor:
        """Return the sum of the densities of attention's calls since the last time, and their number, [2]."""
        taken = self._windows.take() if self._windows else []
        if not taken:
            return torch.zeros(2, device=self._device)
        total = torch.stack(taken).sum(dtype=torch.float32)
        return torch.stack([total, torch.full_like(total, len(taken))])

    def _write_verdict(self) -> None:
        if self._world.size > 1:  # one rank alone asks itself, at any time
            self._own[1] = self._stop.verdict(fence=self._fence, reads_folder=self._world.rank == 0)


def mark_time(device: torch.device) -> Instant:
    """Return now; on a GPU, when its queue gets here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _read_energy(device: torch.device) -> ReadAhead | None:
    if device.type != "cuda":
        return None
    counter = counter_of(str(torch.cuda.get_device_properties(device).uuid), nvml=open_nvml())
    return None if counter is None else ReadAhead(counter)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
