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
    kind, chosen = _visible_entries(visible, present=present)
    if len(set(chosen)) < len(chosen):
        return 0  # a repeated entry is a mistake: CUDA shows nothing
    # A process sees one slice of a divided GPU, however many are listed.
    return min(present, 1 if kind == "MIG-" else len(chosen))


def _visible_entries(visible: str, *, present: int) -> tuple[str, list[str] | list[int]]:
    """Return the entries of CUDA_VISIBLE_DEVICES that count, after what they begin with: GPU- or MIG-, or a number."""
    entries = [entry.strip() for entry in visible.split(",")]
    kind = entries[0][:4]
    if kind in ("GPU-", "MIG-"):
        return kind, list(takewhile(lambda entry: entry.startswith(kind), entries))
    return "", list(takewhile(lambda index: index in range(present), map(_index, entries)))


def _index(entry: str) -> int:
    number = re.match(r"[0-9]{1,9}", entry)
    return int(number[0]) if number else -1


def gpu_bytes(environ: Mapping[str, str]) -> int | None:
    """Return the memory of the smallest GPU that a process with this environment would see.

    None if nvidia-smi does not tell, as it does not of a slice of a divided GPU (MIG).
    """
    sizes = [memory for _, memory, _ in _visible_gpus(environ)]
    try:
        return min(map(int, sizes)) * (1 << 20)  # it counts in MiB
    except ValueError:
        return None


def gpu_name(environ: Mapping[str, str]) -> str | None:
    """Return the name of the first GPU that a process with this environment would see; None as for its memory."""
    return next((name for *_, name in _visible_gpus(environ)), None)


def _visible_gpus(environ: Mapping[str, str]) -> list[list[str]]:
    """Return UUID, memory and name of each GPU that may be seen, as nvidia-smi reports them; none if that fails."""
    fields = "mig.mode.current,uuid,memory.total,name"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [gpu for line in done.stdout.splitlines() if len(gpu := line.split(", ", 3)) == 4]  # else it is a message
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        kind, chosen = _visible_entries(visible, present=len(gpus))
        if kind:
            gpus = [gpu for gpu in gpus if any(gpu[1].startswith(str(entry)) for entry in chosen)]
        elif environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":  # CUDA counts them otherwise, the fastest first
            gpus = [gpus[int(index)] for index in chosen]
    return [] if any(mode == "Enabled" for mode, *_ in gpus) else [rest for _, *rest in gpus]


def core_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
