"""What decides the result of a run: code, data, versions, hardware, environment variables. Imports no torch."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import MANIFEST_NAME
from configs.schema import RunConfig
from configs.secrets import public_variables
from data_pipeline.content import damaged_files, data_sha256
from data_pipeline.hashes import file_sha256, json_sha256
from data_pipeline.manifest_file import read_data_manifest
from data_pipeline.tokenizer_files import find_tokenizer, tokenizer_sha256
from training.checkpoint.manifest import check_whole, find_checkpoint, model_sha256
from training.folder import with_dotted_keys
from training.host_memory import host_limit
from training.versions import CODE, HOUSE

INIT_FROM, BRANCH_FROM = "train.init_from", "train.branch_from"  # what names a run's initial state
# The environment variables that may change a result. They are recorded with their values.
CPU_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
GPU_VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("CUBLASLT_WORKSPACE_SIZE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHDYNAMO_DISABLE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_MIN_NCHANNELS"),
    *("NCCL_MAX_NCHANNELS", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"),
)
# Keys of a run file that two starts of one run may differ in, or that a reader of the manifest looks for first.
SETTINGS = (
    *("run.seed", "train.precision", "train.deterministic", "train.compile", "train.recompute", "train.steps"),
    *("train.micro_batch", "train.global_batch", "train.batch_warmup", "train.length_warmup"),
    *("parallel.sequence", "model.attention", "model.windows"),
)


def source_hashes() -> dict[str, str]:
    """Return a hash of the source files of each of our packages, as installed."""
    hashes = {}
    for name in CODE:
        files = sorted((HOUSE / name).rglob("*.py")) if (HOUSE / name).is_dir() else [HOUSE / name]
        digest = hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(HOUSE).as_posix()} {len(content)}\n".encode() + content)
        hashes[name] = digest.hexdigest()
    return hashes


def code_facts(source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the commit of the code, whether it was changed, and the hashes of its source files.

    Args:
        source: Result of `source_code`.
    """
    commit = source["commit"] if source else None
    return {"commit": commit, "changed": bool(source and source["diff"]), "sha256": source_hashes()}


def data_facts(folder: Path, *, reads_all: bool = False) -> dict[str, Any]:
    """Return what identifies prepared data; `problem` says why it cannot be used.

    Args:
        folder: Folder of the prepared data.
        reads_all: Whether to read every byte.
    """
    facts: dict[str, Any] = {"folder": str(folder), "problem": None}
    try:
        manifest = read_data_manifest(folder)
        if manifest is None:
            return {**facts, "problem": f"not in {folder}"}
        facts |= {
            "manifest_sha256": file_sha256(folder / MANIFEST_NAME),
            "fingerprint": manifest.inputs_sha256,
            "tokens": sum(part.tokens for part in manifest.parts),
            "sha256": data_sha256(manifest),
            "tokenizer_sha256": tokenizer_sha256(find_tokenizer(folder)),
        }
        problems = damaged_files(folder, manifest, reads_all=reads_all)
    except InputError as error:
        problems = [str(error).partition(": ")[0]]
    return {**facts, "problem": problems[0] if problems else None}


def begins_with(config: RunConfig) -> tuple[str, str] | None:
    """Return the key that names the checkpoint which a run begins with, and its path; None if its weights are drawn."""
    named = ((INIT_FROM, config.train.init_from), (BRANCH_FROM, config.train.branch_from))
    return next(((key, path) for key, path in named if path is not None), None)


def weights_facts(beginning: tuple[str, str] | None, *, reads_all: bool = False) -> dict[str, Any]:
    """Return what identifies the checkpoint that a run begins with; `problem` says why it cannot be used.

    Args:
        beginning: Result of `begins_with`: of a branch, optimizer state counts too.
        reads_all: Whether to read every byte.
    """
    if beginning is None:
        return {"path": None, "sha256": None, "problem": None}
    key, path = beginning
    facts: dict[str, Any] = {"key": key, "path": path, "sha256": None, "problem": None}
    try:
        folder, manifest = find_checkpoint(Path(path), warn=False)
        manifest = check_whole(folder) if reads_all else manifest
    except InputError as error:
        return {**facts, "problem": str(error).partition(": ")[0]}
    of_state = {name: entry.sha256 for name, entry in manifest.files.items()}
    return {**facts, "sha256": json_sha256(of_state) if key == BRANCH_FROM else model_sha256(manifest)}


def hardware_facts(*, gpu: str | None, gpus: int, cores: int) -> dict[str, Any]:
    """Return what a rank computes on.

    Args:
        gpu: Name of the GPU; None if the ranks are CPU ranks.
        gpus: GPUs of this machine.
        cores: CPU cores that this process may use.
    """
    cpu, memory = cpu_name(), host_limit().size
    return {"device": gpu or cpu, "gpus": gpus, "cpu": cpu, "cores": cores, "memory_bytes": memory}


def cpu_name() -> str:
    """Return the model of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part")))
    return next(names, "a CPU without a name")


def variable_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that may change a result and are set."""
    return public_variables({name: environ[name] for name in (*CPU_VARIABLES, *GPU_VARIABLES) if name in environ})


def setting_facts(config: RunConfig) -> dict[str, Any]:
    """Return the values of `SETTINGS`."""
    values = with_dotted_keys(config.model_dump(mode="json"))
    return {key: values.get(key) for key in SETTINGS}
