"""Count this machine's GPUs and CPU cores without importing torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def gpu_count(environment: Mapping[str, str], *, devices: Path = Path("/dev")) -> int:
    """Return the number of GPUs that a process with this environment would see.

    Args:
        environment: Environment of the process. CUDA_VISIBLE_DEVICES may hide GPUs.
        devices: Folder of the device files.
    """
    present = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA ignores everything after the first invalid entry.
    chosen = 0
    for entry in visible.split(","):
        if not entry.strip() or entry.strip() == "-1":
            break
        chosen += 1
    return min(present, chosen)


def core_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
