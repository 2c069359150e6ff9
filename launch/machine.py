"""Count this machine's GPUs and CPU cores without importing torch, and ask torch whether it can use the GPUs."""

import os
import re
import subprocess
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from configs.errors import MachineError
from configs.figures import counted


def gpu_count(environ: Mapping[str, str], *, devices: Path = Path("/dev")) -> int:
    """Return the number of GPUs that a process with this environment would see.

    Args:
        environ: Environment of the process. CUDA_VISIBLE_DEVICES may hide GPUs.
        devices: Folder of the device files.
    """
    present = len(_device_files(devices))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else _visible_count(visible, present=present)


def device_type(environ: Mapping[str, str]) -> str:
    """Return the device type of the ranks that a process with this environment would start: cuda or cpu."""
    return "cuda" if gpu_count(environ) else "cpu"


def require_usable_gpus(environ: Mapping[str, str], *, devices: Path = Path("/dev")) -> None:
    """Refuse GPUs that torch cannot use: ranks would compute on CPUs without a word, or fail when they meet.

    Imports torch: call it in a rank, once that has been imported.

    Args:
        environ: Environment of this process.
        devices: Folder of the device files.
    Raises:
        MachineError: says why torch cannot use them, and what to do.
    """
    import torch

    gpus = gpu_count(environ, devices=devices)
    if not gpus or torch.cuda.is_available() or all(map(_is_kept_from_us, _device_files(devices))):
        return
    reason = "it sees none"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the second if it is built without CUDA
        reason = str(error).partition("\n")[0].rstrip(".")
    raise MachineError(
        f"this machine has {counted(gpus, 'GPU')}, which torch {torch.__version__} cannot use ({reason}): install the "
        'build of torch for its driver, or repair that; or set CUDA_VISIBLE_DEVICES="" for CPU ranks'
    )


def _device_files(devices: Path) -> list[Path]:
    return [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]


def _is_kept_from_us(device: Path) -> bool:
    """Return whether a GPU is not ours, as in a job that asked for none."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except PermissionError:
        return True
    except OSError:  # it is broken
        pass
    return False


def _visible_count(visible: str, *, present: int) -> int:
    """Count the entries of CUDA_VISIBLE_DEVICES as torch does: up to the first that names no GPU.

    So an empty text, -1, none, void and SLURM's NoDevFiles mean no GPU.
    """
    entries = [entry.strip() for entry in visible.split(",")]
    kind = entries[0][:4]
    chosen: list[str] | list[int]
    if kind in ("GPU-", "MIG-"):
        chosen = list(takewhile(lambda entry: entry.startswith(kind), entries))
    else:
        chosen = list(takewhile(lambda index: index in range(present), map(_index, entries)))
    if len(set(chosen)) < len(chosen):
        return 0  # a repeated entry is a mistake: CUDA shows nothing
    # A process sees one slice of a divided GPU, however many are listed.
    return min(present, 1 if kind == "MIG-" else len(chosen))


def _index(entry: str) -> int:
    number = re.match(r"[0-9]{1,9}", entry)
    return int(number[0]) if number else -1


def gpu_bytes() -> int | None:
    """Return the memory of this machine's smallest GPU, as nvidia-smi reports it; None if that fails."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return min(int(line) for line in done.stdout.split()) * (1 << 20)  # it counts in MiB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def gpu_name() -> str | None:
    """Return the name of this machine's first GPU, as nvidia-smi reports it; None if that fails."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def core_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
