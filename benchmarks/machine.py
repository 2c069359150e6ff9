"""What every benchmark prints with its result: the machine, the versions, and the rate of a matrix product just now."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from training.utilization import measured_gemm
from training.versions import installed_version

PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core", "trainshort")


def print_result(benchmark: str, *, device: torch.device | None = None, **fields: Any) -> None:
    """Print one JSON line.

    Args:
        benchmark: Its name.
        device: What it ran on; the CPU unless given.
        fields: Its result.
    """
    print(json.dumps({"benchmark": benchmark, **fields, **_machine(device or torch.device("cpu"))}), flush=True)


def _machine(device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if is_gpu else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(measured_gemm(device, torch.bfloat16 if is_gpu else torch.float32) / 1e9, 1),
        "versions": {"python": sys.version.split()[0], **{name: installed_version(name) for name in PACKAGES}},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"
