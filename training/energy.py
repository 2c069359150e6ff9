"""Energy of GPUs, by the counters of NVIDIA's driver. Imports no torch.

The driver's library is called by its C interface, so that no package has to be installed for it. GPUs older than Volta,
and parts of a GPU (MIG), have no counter.

Source: NVML's reference, nvmlDeviceGetTotalEnergyConsumption.
"""

import ctypes
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.paths import discarded_metrics_path, metrics_path

_FIELD = "energy_joules"  # of a step in metrics.jsonl
_LIBRARY = "libnvidia-ml.so.1"


class EnergyCounter:
    """The counter of one GPU. Build it with `counter_of` or `counters_of_node`."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle
        self._last = self._joules()

    def take(self) -> float | None:
        """Return the joules since the last call, or since the counter was built; None if the driver does not tell."""
        last, self._last = self._last, self._joules()
        return None if last is None or self._last is None else self._last - last

    def _joules(self) -> float | None:
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.pointer(millijoules))
        return None if failed else millijoules.value / 1000


def open_nvml(library: str = _LIBRARY) -> Any | None:
    """Return the driver's library, ready to be called; None where there is none."""
    try:
        nvml = ctypes.CDLL(library)
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
    """Return the energy of all steps in the files of a run, also of those that were lost; 0 if none tells."""
    total = 0.0
    for path in (metrics_path(run_dir), discarded_metrics_path(run_dir)):
        with suppress(OSError), path.open("rb") as file:
            for line in file:
                if _FIELD.encode() in line:
                    with suppress(ValueError, KeyError, TypeError):  # a torn line
                        total += float(json.loads(line)[_FIELD])
    return total
