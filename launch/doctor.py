"""Report what this machine can do, and whether a run's ALiBi is exact on it."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from configs.backends import BACKENDS, Backend, backend_of, installed_packages, unavailable
from configs.errors import InputError, TrainshortError
from configs.positions import POSITIONS
from configs.precisions import require_device
from configs.schema import RunConfig
from launch.machine import core_count, device_type, gpu_count
from training.preflight import check_backend
from training.versions import installed_version

# The dependencies in pyproject.toml, and the packages that attention backends may need.
REPORTED_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "sentencepiece",
    "tokenizers",
    "mlflow",
    "transformers",
    "safetensors",
    "gguf",
    "accelerate",
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
BACKEND_FIELDS = (
    "name",
    "what",
    "positions",
    "precisions",
    "head_dims",
    "devices",
    "capability",
    "package",
    "memory",
    "has_run",
)


def machine_report() -> dict[str, Any]:
    """Return what this machine has and lacks, one entry per concern; memory in bytes."""
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
    """Return total and available memory in bytes, or None where the system does not report it."""
    # Lines such as "MemTotal:       16384000 kB".
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {
        key: kilobytes[name] * 1024 if name in kilobytes else None
        for key, name in (("memory_bytes", "MemTotal"), ("available_bytes", "MemAvailable"))
    }


def gpu_report() -> dict[str, Any]:
    """Return the GPUs that torch can use, and the communication backends of torch.distributed."""
    import torch
    import torch.distributed as dist

    # torch counts GPUs by the driver's library, also those that it cannot use.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    # Counted without torch: a torch build without CUDA, or an old driver, shows as GPUs that are present but unusable.
    present = gpu_count(os.environ)
    return {
        "present": present,
        "usable": [
            {
                "name": device.name,
                "memory_bytes": device.total_memory,
                "capability": (device.major, device.minor),
                "bf16": device.major >= 8,  # older GPUs only emulate it
            }
            for device in devices
        ],
        "torch_cuda": torch.version.cuda,
        "nccl": dist.is_nccl_available(),
        "gloo": dist.is_gloo_available(),
    }


def network_report() -> dict[str, Any]:
    """Return this machine's name and addresses, and a port on which local ranks can connect."""
    host = socket.gethostname()
    return {"host": host, "addresses": addresses_of(host), "free_port": free_port()}


def addresses_of(host: str) -> list[str]:
    """Return the addresses that a host name resolves to; empty if it does not resolve."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return sorted({str(address[0]) for *_, address in entries})
    except OSError:
        return []


def free_port() -> int | None:
    """Return a TCP port on the loopback interface that could be bound and reached, or None if that failed."""
    try:
        # Bind and connect: a firewall may allow the first and refuse the second.
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return port
    except OSError:
        return None


def backends_report(gpus: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the attention backends, each with what this machine lacks for it.

    Args:
        gpus: Result of `gpu_report`.
    """
    packages = installed_packages()
    device = "cuda" if gpus["usable"] else "cpu"
    # A run uses all GPUs: the oldest one decides.
    oldest = min((gpu["capability"] for gpu in gpus["usable"]), default=None)

    def lacks(backend: Backend) -> str | None:
        return unavailable(backend, device=device, packages=packages, capability=oldest)

    return [
        {**{field: getattr(backend, field) for field in BACKEND_FIELDS}, "lacks": lacks(backend)}
        for backend in BACKENDS.values()
    ]


def alibi_report(config: RunConfig) -> dict[str, Any]:
    """Return the precision audit of a run's ALiBi on this machine, with the run's backend, precision and lengths.

    Raises:
        InputError: the run has other positions, or its backend or precision is not available on this machine.
    """
    model, precision = config.model, config.train.precision
    if POSITIONS[model.position].bias != "slopes":  # before the slow imports below
        raise InputError(
            f"--alibi audits ALiBi, but model.position is {model.position}: give a run with model.position alibi"
        )
    check_backend(model, device=device_type(os.environ))
    import torch

    from training.model.proof.attention_weights import dtype_of
    from training.model.proof.audit import audit
    from training.model.single import inference

    promised = POSITIONS[model.position].slopes
    assert promised is not None, "a bias of slopes promises them"
    device = "cuda" if gpu_report()["usable"] else "cpu"
    check_backend(model, device=device)
    row = require_device(precision, device=device, key="train.precision")
    backend, limit = alibi_backend(config, device=device).name, row.row_tolerance
    audit_at = partial(
        audit,
        backend,
        slopes=promised(model),
        head_dim=model.head_dim,
        dtype=dtype_of(precision),
        device=torch.device(device),
        windows=model.windows != "off",
        by_scores=model.windows == "scores",
    )
    with inference(row):
        lengths = sorted({config.data.sequence_length, *config.evaluation_lengths, *config.validation_lengths})
        audits = [audit_at(length=length) for length in lengths]
    return {
        "run": config.run.name,
        "backend": backend,
        "precision": precision,
        "device": device,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "limit": limit,
        "within": all(length_audit.worst.measured.worst <= limit for length_audit in audits),
        "windows": model.windows,
        "lengths": [asdict(length_audit) for length_audit in audits],
    }


def weights_report(path: Path, *, lengths: Sequence[int], precision: str) -> dict[str, Any]:
    """Return the windows of a checkpoint's queries and keys on its held-out text, per layer and head.

    Args:
        path: The checkpoint.
        lengths: Tokens of the text to take, each from its start; longer ones than the text are left out.
        precision: Type of queries and keys, as a value of `train.precision`.
    Returns:
        The checkpoint, the text and the windows by length; without windows, `unknown` says why.
    """
    import torch

    from training.checkpoint.read import open_checkpoint
    from training.evaluation.text import held_out_text
    from training.model.proof.head_windows import windows_of_weights
    from training.model.single import load_single

    opened = open_checkpoint(path)
    report: dict[str, Any] = {"checkpoint": str(opened.path), "lengths": []}
    try:
        text = held_out_text(opened)
    except InputError as error:
        return {**report, "unknown": f"not measured: it needs the held-out text, of which evaluate says: {error}"}
    model = load_single(opened, precision=precision)
    tokens = torch.from_numpy(text.tokens[: max(lengths, default=0) + 1].astype("int64"))
    for length in lengths:
        if length < len(tokens):
            windows = windows_of_weights(model.blocks, partial(model.losses, tokens[None, : length + 1]))
            report["lengths"].append({"length": length, "layers": [asdict(layer) for layer in windows]})
    shortest = f"the held-out text has {len(text.tokens):,} tokens, fewer than the run's lengths need"
    return {**report, "text": text.name, **({} if report["lengths"] else {"unknown": shortest})}


def alibi_backend(config: RunConfig, *, device: str) -> Backend:
    """Return the attention backend of a run on this machine, whose oldest GPU decides for `auto`."""
    model = config.model
    return backend_of(
        model.attention,
        device=device,
        position=model.position,
        precision=config.train.precision,
        head_dim=model.head_dim,
        documents=config.data.mask_documents,
        capability=min((gpu["capability"] for gpu in gpu_report()["usable"]), default=None),
    )


def check_audit(report: dict[str, Any]) -> None:
    """Refuse an audit that exceeds its limit.

    Args:
        report: Result of `alibi_report`.
    Raises:
        TrainshortError: names the length and the head with the largest error.
    """
    if report["within"]:
        return
    distance, length, head = max(
        (head["measured"]["worst"], audit["length"], head["head"])
        for audit in report["lengths"]
        for head in audit["heads"]
    )
    raise TrainshortError(
        f"ALiBi is not exact here: {report['backend']} in {report['precision']} puts {distance:.2g} of a row's "
        f"attention of head {head} at length {length} on wrong keys (allowed {report['limit']:g}): use another "
        "model.attention or train.precision fp32, and report this"
    )
