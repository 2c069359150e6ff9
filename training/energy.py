"""Energy of GPUs, by the counters of NVIDIA's driver. Imports no torch.

The driver's library is called by its C interface, so that no package has to be installed for it. GPUs older than Volta,
and parts of a GPU (MIG), have no counter.

Source: NVML's reference, nvmlDeviceGetTotalEnergyConsumption.
"""

import ctypes
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from configs.figures import JOULES_PER_KWH
from configs.paths import discarded_metrics_path, metrics_path

READ_SECONDS = 0.25  # the counter of an H100 changes every 0.1 s
_FIELD = "energy_joules"  # of a step in metrics.jsonl
_LIBRARY = "libnvidia-ml.so.1"
_FUNCTIONS = (
    *("nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByUUID"),
    "nvmlDeviceGetTotalEnergyConsumption",
)


class EnergyCounter:
    """The counter of one GPU. Build it with `counter_of` or `counters_of_node`."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle
        self._last = self.joules()

    def take(self) -> float | None:
        """Return the joules since the last call, or since the counter was built; None if the driver reports none."""
        return self.take_of(self.joules())

    def take_of(self, now: float | None) -> float | None:
        """Return what `take` returns, given a value from `joules`."""
        last, self._last = self._last, now
        return None if last is None or now is None else now - last

    def joules(self) -> float | None:
        """Ask the driver, which takes milliseconds; None if it reports none."""
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.pointer(millijoules))
        return None if failed else millijoules.value / 1000


class ReadAhead:
    """Asks a counter's driver in a thread: on an H100 an answer takes 4 ms, at times 30, which no step can wait for."""

    def __init__(self, counter: EnergyCounter) -> None:
        self._counter = counter
        self._joules = counter.joules()
        Thread(target=self._read, name="energy", daemon=True).start()

    def take(self) -> float | None:
        """Return the joules since the last call that have been read so far."""
        return self._counter.take_of(self._joules)

    def _read(self) -> None:
        while self._joules is not None:  # a driver that stops reporting is not asked again
            time.sleep(READ_SECONDS)
            self._joules = self._counter.joules()


class EnergyMonitor:
    """Energy and power of a node's GPUs, with the methods of MLflow's monitors."""

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters = counters
        self._totals = [0.0 for _ in counters]
        self.clear_metrics()

    def collect_metrics(self) -> None:
        """Read the counters."""
        for index, counter in enumerate(self._counters):
            joules = counter.take()
            if joules is not None:
                self._totals[index] += joules
                self._recent[index] = self._recent.get(index, 0.0) + joules

    def aggregate_metrics(self) -> dict[str, float]:
        """Return each GPU's energy since the monitor was built, and its mean power since the last `clear_metrics`."""
        seconds = max(time.monotonic() - self._cleared_at, 1e-3)
        metrics = {}
        for index, joules in self._recent.items():
            metrics[f"gpu_{index}_energy_kwh"] = self._totals[index] / JOULES_PER_KWH
            metrics[f"gpu_{index}_mean_power_watts"] = joules / seconds
        return metrics

    def clear_metrics(self) -> None:
        """Begin a new sample."""
        self._recent: dict[int, float] = {}
        self._cleared_at = time.monotonic()


def open_nvml(library: str = _LIBRARY) -> Any | None:
    """Return the driver's library, ready to be called; None where there is none."""
    try:
        nvml = ctypes.CDLL(library)
        for name in _FUNCTIONS:
            getattr(nvml, name)  # an old driver lacks some
        return None if nvml.nvmlInit_v2() else nvml
    except (OSError, AttributeError):
        return None


def counter_of(uuid: str, *, nvml: Any | None) -> EnergyCounter | None:
    """Return the counter of a GPU; None if the driver does not know it.

    Args:
        uuid: As torch gives it, without `GPU-`.
        nvml: From `open_nvml`.
    """
    if nvml is None:
        return None
    handle = ctypes.c_void_p()
    failed = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.pointer(handle))
    return None if failed else EnergyCounter(nvml, handle)


def counters_of_node(nvml: Any | None) -> list[EnergyCounter]:
    """Return the counters of all GPUs that this process may ask for, in the driver's order."""
    if nvml is None:
        return []
    count, counters = ctypes.c_uint(), []
    if nvml.nvmlDeviceGetCount_v2(ctypes.pointer(count)):
        return []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.pointer(handle)):
            counters.append(EnergyCounter(nvml, handle))
    return counters


def spent_joules(run_dir: Path) -> float:
    """Return the energy of all steps in a run's files, lost ones included; 0 if no step has it."""
    total = 0.0
    for path in (metrics_path(run_dir), discarded_metrics_path(run_dir)):
        with suppress(OSError), path.open("rb") as file:
            for line in file:
                if _FIELD.encode() in line:
                    with suppress(ValueError, KeyError, TypeError):  # a torn line
                        total += float(json.loads(line)[_FIELD])
    return total
