"""What this machine can do, and whether a run's ALiBi is exact on it."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.backends import BACKENDS, backend_of, unavailable
from configs.errors import InputError, TrainshortError
from configs.schema import RunConfig
from launch.machine import core_count, gpu_count
from training.preflight import check_backend, installed_packages
from training.versions import installed_version

# What the project depends on, as pyproject.toml has it, and what the attention backends may need.
REPORTED_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "sentencepiece",
    "mlflow",
    "transformers",
    "safetensors",
    "numpy",
    "pyarrow",
    "zstandard",
    "matplotlib",
    "pyyaml",
    "pydantic",
    "typer",
    "rich",
    "jinja2",
    *sorted({backend.package for backend in BACKENDS.values() if backend.package}),
)
SLURM_COMMANDS = ("sbatch", "srun")


def machine_report() -> dict[str, Any]:
    """Return what this machine has and lacks, one entry a concern; memory in bytes."""
    gpus = gpu_report()
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "packages": {name: installed_version(name) for name in REPORTED_PACKAGES},
        "cpu": {"cores": core_count(), **memory_report()},
        "gpus": gpus,
        "network": network_report(),
        "slurm": {command: shutil.which(command) for command in SLURM_COMMANDS},
        "attention": backends_report(gpus),
    }


def memory_report(meminfo: Path = Path("/proc/meminfo")) -> dict[str, int | None]:
    """Return total and available memory in bytes; None where the system does not say."""
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {
        key: kilobytes[name] * 1024 if name in kilobytes else None
        for key, name in (("memory_bytes", "MemTotal"), ("available_bytes", "MemAvailable"))
    }


def gpu_report() -> dict[str, Any]:
    """Return the GPUs as torch sees them, and how ranks talk to each other."""
    import torch
    import torch.distributed as dist

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    present = gpu_count(os.environ)
    return {
        "present": present,
        "usable": [
            {
                "name": device.name,
                "memory_bytes": device.total_memory,
                "capability": (device.major, device.minor),
                "bf16": device.major >= 8,  # what is older only emulates it
            }
            for device in devices
        ],
        "torch_cuda": torch.version.cuda,
        "nccl": dist.is_nccl_available(),
        "gloo": dist.is_gloo_available(),
    }


def network_report() -> dict[str, Any]:
    """Return whether ranks can meet here."""
    host = socket.gethostname()
    return {"host": host, "addresses": addresses_of(host), "free_port": free_port()}


def addresses_of(host: str) -> list[str]:
    """Return the addresses that a name resolves to, none where it does not."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def free_port() -> int | None:
    """Return a TCP port that could be bound on the loopback and reached there; None where that failed."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return port
    except OSError:
        return None


def backends_report(gpus: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the attention backends and what this machine, of some GPUs or none, lacks for each."""
    packages = installed_packages()
    device = "cuda" if gpus["usable"] else "cpu"
    oldest = min((gpu["capability"] for gpu in gpus["usable"]), default=None)
    return [
        {**asdict(backend), "lacks": unavailable(backend, device=device, packages=packages, capability=oldest)}
        for backend in BACKENDS.values()
    ]


def alibi_report(config: RunConfig) -> dict[str, Any]:
    """Return the precision audit of a run's ALiBi: its type and backend, its lengths, this machine.

    Raises:
        InputError: the run has other positions, or a backend that this machine lacks.
    """
    model, precision = config.model, config.train.precision
    if model.position != "alibi":
        raise InputError(
            f"--alibi audits ALiBi, but model.position is {model.position}: give a run with model.position alibi"
        )
    import torch

    from training.model.proof.attention_weights import DTYPES, ROW_TOLERANCE
    from training.model.proof.audit import audit

    device = "cuda" if gpu_report()["usable"] else "cpu"
    check_backend(model, device=device)
    backend, dtype = backend_of(model.attention).name, DTYPES[precision]
    lengths = sorted({config.data.sequence_length, *config.evaluation_lengths})
    audits = [
        audit(
            backend,
            heads=model.heads,
            head_dim=model.head_dim,
            length=length,
            dtype=dtype,
            device=torch.device(device),
        )
        for length in lengths
    ]
    return {
        "run": config.run.name,
        "backend": backend,
        "precision": precision,
        "device": device,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "limit": ROW_TOLERANCE[dtype],
        "within": all(one.worst.measured.worst <= ROW_TOLERANCE[dtype] for one in audits),
        "lengths": [asdict(one) for one in audits],
    }


def check_audit(found: dict[str, Any]) -> None:
    """Refuse an audit that is over its limit.

    Raises:
        TrainshortError: names the length and head that are furthest off.
    """
    if found["within"]:
        return
    distance, length, head = max(
        (head["measured"]["worst"], one["length"], head["head"]) for one in found["lengths"] for head in one["heads"]
    )
    raise TrainshortError(
        f"ALiBi is not exact here: {found['backend']} in {found['precision']} puts {distance:.2g} of a row's attention "
        f"of head {head} at length {length} on wrong keys (allowed {found['limit']:g}): use another model.attention "
        "or train.precision fp32, and report this"
    )
