"""Start and stop a rank: its place in the world and where the ranks meet. The only reader of the environment.

Torch is imported inside functions, so that a launcher can call `find_process_rank` without loading it.
"""

import logging
import os
import re
import resource
import signal
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

from configs.errors import InputError, MachineError
from parallel.compilers import check_cache_folder

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # the values that torch accepts for deterministic algorithms
# what `train.deterministic` sets; of NCCL: adds in the order of the ring, as NVLink's switches have no fixed order
DETERMINISTIC_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": _CUBLAS_WORKSPACES[0], "NCCL_ALGO": "Ring"}
# what makes a process a rank, and what `start` sets
_VARIABLES_OF_A_RANK = (
    "TRAINSHORT_RANK",
    "TRAINSHORT_RANKS",
    "TRAINSHORT_RENDEZVOUS",
    "TRAINSHORT_TERMINAL",
    "TRAINSHORT_COMMAND",
    "TRAINSHORT_ENDS_TOLD",
    "TORCHELASTIC_RUN_ID",
    "SLURM_PROCID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MANY_FILES = 1 << 16  # some ten connections of each of 4,096 ranks


@dataclass(frozen=True)
class ProcessRank:
    """This process among the ranks of a job.

    Attributes:
        rank, world_size: This process's rank, and the number of ranks.
        local_rank: Rank on this machine; it picks the GPU.
        rendezvous: Where the ranks meet, as torch's init_method.
        starter: local, torchrun or slurm.
        terminal: File descriptor of the terminal to which a rank of the local launcher shows progress, or None.
    """

    rank: int
    world_size: int
    local_rank: int
    rendezvous: str
    starter: str
    terminal: int | None = None


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
            terminal = int(environ["TRAINSHORT_TERMINAL"]) if "TRAINSHORT_TERMINAL" in environ else None
            return ProcessRank(rank, int(environ["TRAINSHORT_RANKS"]), rank, meet, "local", terminal)
        if "TORCHELASTIC_RUN_ID" in environ:
            return ProcessRank(
                int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]), "env://", "torchrun"
            )
        if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
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
    port = int(environ.get("MASTER_PORT") or 20000 + int(environ["SLURM_JOB_ID"]) % 20000)
    return f"tcp://{host}:{port}"


def _first_host(node_list: str) -> str:
    """Return the first host name of a SLURM node list: rack1-gpu01 of rack[1-2]-gpu[01-04,07],login.

    `scontrol show hostnames` gives it too, but a container has no scontrol.
    """
    # A name may have brackets anywhere, several times, and dots. The first host has the first choice of each.
    first = re.match(r"(?:[\w.-]|\[[^][]+\])+(?=,|$)", node_list)
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, which names no host")
    return host


def environment() -> Mapping[str, str]:
    """Return the environment, for the variables of a library that a user expects to count."""
    return os.environ


def environment_beside_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that a rank starts and that is not a rank: one thread, and no GPU."""
    kept = {name: value for name, value in environ.items() if name not in _VARIABLES_OF_A_RANK}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def rank_threads(*, cores: int, ranks: int) -> str:
    """Return OMP_NUM_THREADS of the local launcher's ranks, unless the environment sets it."""
    return str(max(1, cores // ranks))


def slurm_job(environ: Mapping[str, str]) -> dict[str, str | None] | None:
    """Return the id and the nodes of the SLURM job that a process belongs to; None outside SLURM."""
    if "SLURM_JOB_ID" not in environ:
        return None
    return {"job_id": environ["SLURM_JOB_ID"], "nodes": environ.get("SLURM_JOB_NODELIST")}


def node_count(environ: Mapping[str, str]) -> int:
    """Return how many nodes the ranks of this process's job run on."""
    if "TRAINSHORT_RANK" in environ:
        return 1
    name = "GROUP_WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in environ else "SLURM_STEP_NUM_NODES"
    return int(environ.get(name) or 1)


def hold_stop_signals() -> None:
    """Block SIGTERM and SIGINT until the rank can save, so that a signal during the slow imports does not kill it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def ignore_stop_signals() -> None:
    """Ignore SIGTERM and SIGINT in a rank that another one ends, or that has saved: at exit Python drops handlers.

    Blocking them is not enough: libraries have threads that do not.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does, raise KeyboardInterrupt: launchers, schedulers and `timeout` send it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def choose_gpu(process: ProcessRank, *, visible: int) -> int | None:
    """Return the index of this rank's GPU among those that its process sees; None for a CPU rank.

    Args:
        process: This process among the ranks.
        visible: Number of GPUs that it sees: all of the machine, or one of its own, as `srun --gpus-per-task=1` gives.
    Raises:
        InputError: the machine has more ranks than GPUs.
    """
    if not visible:
        return None
    if process.local_rank < visible:
        return process.local_rank
    # Local ranks inherit one environment, so they see the same GPU. From others NCCL learns if two share one.
    if visible == 1 and process.starter != "local":
        return 0
    raise InputError(
        f"local rank {process.local_rank}, counted from 0, has no GPU, because this machine's ranks see {visible}: "
        f"start at most {visible} ranks on a machine, or let each rank see all GPUs or one of its own "
        "(CUDA_VISIBLE_DEVICES)"
    )


def open_gpu_early(process: ProcessRank, *, tensor: int) -> None:
    """Open this rank's GPU in a thread, which takes a second or two, while DeepSpeed and megatron-core are imported.

    Errors are left to `start`, which opens the GPU if this has not.

    Args:
        process: The rank.
        tensor: Tensor ranks: among several, megatron-core expects that a GPU starts kernels in the order in which they
            were launched, so that a collective begins before the product that hides it.
    """
    import torch

    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # read when the GPU is opened

    def open_gpu(index: int) -> None:
        with suppress(RuntimeError):  # of CUDA
            torch.cuda.set_device(index)
            torch.zeros(1, device="cuda")  # makes CUDA's context

    with suppress(InputError):
        index = choose_gpu(process, visible=torch.cuda.device_count())
        if index is not None:
            Thread(target=open_gpu, args=(index,), name="opening the GPU", daemon=True).start()


def start(process: ProcessRank) -> "torch.device":
    """Join the other ranks and return this rank's device: NCCL if there are GPUs, else gloo.

    Raises:
        InputError: the machine has more ranks than GPUs.
    """
    import torch
    import torch.distributed as dist

    flush_denormals()
    sum_in_fp32()
    allow_many_files()
    if process.starter == "local":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's hostname may not resolve
    index = choose_gpu(process, visible=torch.cuda.device_count())
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if index is not None:
        torch.cuda.set_device(device)
    # DeepSpeed takes LOCAL_RANK as the device index. With one GPU visible per process that is 0 on every rank.
    os.environ["LOCAL_RANK"] = str(index or 0)
    try:
        dist.init_process_group(
            "gloo" if index is None else "nccl",
            init_method=process.rendezvous,
            rank=process.rank,
            world_size=process.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            # NCCL then connects at once, which one rank alone has no use for.
            device_id=device if index is not None and process.world_size > 1 else None,
        )
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise InputError(
            f"local rank {process.local_rank}, counted from 0, shares its GPU with another rank (it sees "
            f"{torch.cuda.device_count()}): start one rank per GPU, or let each rank see one of its own"
        ) from None
    return device


def start_alone() -> "torch.device":
    """Create a world of one rank, for evaluation and export; a second call changes nothing.

    Raises:
        InputError: torch cannot use the folder of what it compiles.
    """
    import torch
    import torch.distributed as dist

    check_cache_folder(os.environ)
    flush_denormals()
    sum_in_fp32()
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def flush_denormals() -> None:
    """Round numbers below 1e-38 to zero on the CPU, in this thread and in threads that it starts later.

    ALiBi gives far keys such weights, and CPUs compute slowly with them: a training step took twice as long.
    """
    import torch

    torch.set_flush_denormal(True)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as the system lets it.

    The first rank serves the store in which the ranks meet. Each rank opens two connections to it per group of NCCL's,
    so some hundred ranks exceed the usual limit of 1,024.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(most, MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, wanted), most))


def sum_in_fp32() -> None:
    """Let GPUs add up products of 16-bit numbers in fp32; by default cuBLAS may round partial sums to 16 bits."""
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def use_deterministic_algorithms() -> None:
    """Let this process compute the same bits each time; call it before `start`. Torch fails at what it cannot repeat.

    Source: torch's notes on reproducibility, and Megatron Core's page on deterministic training.

    Raises:
        InputError: CUBLAS_WORKSPACE_CONFIG has a value with which cuBLAS is not deterministic.
    """
    import torch

    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACES[0])
    if workspace not in _CUBLAS_WORKSPACES:
        raise InputError(
            f"train.deterministic is true, but the environment sets CUBLAS_WORKSPACE_CONFIG to {workspace!r}: unset "
            f"it, or use {' or '.join(_CUBLAS_WORKSPACES)}"
        )
    for name, value in DETERMINISTIC_VARIABLES.items():  # read when cuBLAS and NCCL start
        os.environ.setdefault(name, value)
    # With warn_only, torch would keep the backward pass of attention that is not deterministic.
    torch.use_deterministic_algorithms(True)
    # Only code that reads what nothing has written needs it, and it writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


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
    """Keep library logs and warnings off the user's terminal, unless `--verbose` asks for all of them."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for package in ("deepspeed", "megatron"):
        warnings.filterwarnings("ignore", module=rf"{package}\..*")
    # DeepSpeed calls these functions, but torch attributes the warning to its own module.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # With NCCL, stages send by the communicator of all ranks, of which torch warns: they take turns in any case.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    # One rank alone has no `device_id`; `start` has set the current device.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
