"""Start and stop a rank: its place in the world and where the ranks meet. The only reader of the environment.

Torch is imported inside functions, so that a launcher can call `find_process_rank` without loading it.
"""

import logging
import os
import re
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from configs.errors import MachineError

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class ProcessRank:
    """This process among the ranks of a job.

    Attributes:
        rank, world_size: This process's rank, and the number of ranks.
        local_rank: Rank on this machine; it picks the GPU.
        rendezvous: Where the ranks meet, as torch's init_method.
        starter: local, torchrun or slurm.
    """

    rank: int
    world_size: int
    local_rank: int
    rendezvous: str
    starter: str


def find_process_rank(environ: Mapping[str, str]) -> ProcessRank | None:
    """Return this process's place among the ranks of a job, or None if it is not a rank.

    A multi-task srun step and torchrun start ranks; a batch script or a shell in an allocation is not a rank.

    Raises:
        MachineError: a variable that the starter sets is missing or not a number.
    """
    try:
        if "TRAINSHORT_RANK" in environ:
            rank = int(environ["TRAINSHORT_RANK"])
            meet = f"file://{environ['TRAINSHORT_RENDEZVOUS']}"
            return ProcessRank(rank, int(environ["TRAINSHORT_RANKS"]), rank, meet, "local")
        if "TORCHELASTIC_RUN_ID" in environ:
            return ProcessRank(
                int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]), "env://", "torchrun"
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            rank, size = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
            return ProcessRank(rank, size, int(environ["SLURM_LOCALID"]), _slurm_rendezvous(environ), "slurm")
    except (KeyError, ValueError) as error:
        raise MachineError(
            f"this looks like a rank of a job, but its environment is incomplete ({error}): start the ranks with "
            "trainshort, torchrun or srun"
        ) from None
    return None


def _slurm_rendezvous(environ: Mapping[str, str]) -> str:
    # The batch script sets both at each start; an srun typed by hand sets neither.
    host = environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"])
    port = environ.get("MASTER_PORT") or 20000 + int(environ["SLURM_JOB_ID"]) % 20000
    return f"tcp://{host}:{port}"


def _first_host(node_list: str) -> str:
    """Return the first host name of a SLURM node list: gpu-001 of gpu-[001-004,007]."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {node_list!r}")
    return match[1] + (match[2] or "")


def hold_stop_signals() -> None:
    """Block SIGTERM and SIGINT until the rank can save, so that a signal during the slow imports does not kill it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start(place: ProcessRank) -> "torch.device":
    """Join the other ranks and return this rank's device: NCCL if there are GPUs, else gloo."""
    import torch
    import torch.distributed as dist

    flush_denormals()
    if place.starter == "local":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's hostname may not resolve
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", place.local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    # DeepSpeed takes LOCAL_RANK as the device index. With one GPU visible per process that is 0 on every rank.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if gpus else None,
    )
    return device


def start_alone() -> "torch.device":
    """Create a world of one rank, for evaluation and export; a second call changes nothing."""
    import torch
    import torch.distributed as dist

    flush_denormals()
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def flush_denormals() -> None:
    """Round numbers below 1e-38 to zero on the CPU, in this thread and in threads that it starts later.

    ALiBi gives far keys such weights, and CPUs compute slowly with them: a training step took twice as long.
    """
    import torch

    torch.set_flush_denormal(True)


def stop() -> None:
    """Leave the job; safe to call when `start` failed."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def choose_accelerator() -> None:
    """Tell DeepSpeed to use the CPU if there is no GPU; otherwise it detects that itself and warns."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_libraries() -> None:
    """Keep library logs and warnings off the user's terminal; warnings about our own code still show."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for package in ("deepspeed", "megatron"):
        warnings.filterwarnings("ignore", module=rf"{package}\..*")
    # DeepSpeed calls these functions, but torch attributes the warning to its own module.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
