"""How much of the hardware a step used: model FLOPs by the published convention over the peak."""

import math
import time

import torch
import torch.distributed as dist

from configs.precisions import PRECISIONS
from configs.schema import Model
from training.families.table import parameter_count

# Dense peaks from the vendors' data sheets, FLOP/s: (16 bit, fp32 as torch runs it by default).
# The first name that is part of the device's wins: H100 PCIe must come before H100.
_GPU_PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "V100": (125e12, 15.7e12),
    "L40S": (362e12, 91.6e12),
    "B200": (2250e12, 80e12),
}


def flops_per_token(model: Model, *, vocab_size: int, length: int) -> float:
    """Return forward and backward FLOPs of one token: 6 N + 12 layers x hidden x length.

    Attention is counted in full, not halved for causality, as the published figures do. Recomputation is not counted.
    """
    parameters = parameter_count(model, vocab_size=vocab_size)
    return 6.0 * parameters + 12.0 * model.layers * model.hidden * length


def world_peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the peak FLOP/s of all ranks together, or None if one is unknown; every rank must call it."""
    dist.barrier()  # CPU ranks share cores, so they measure at the same time
    peak = torch.tensor(peak_flops(device, precision=precision) or float("nan"), device=device)
    dist.all_reduce(peak)
    total = float(peak)
    return None if math.isnan(total) else total


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the peak FLOP/s of this rank's device: a GPU's from its data sheet, a CPU's measured now.

    None for a GPU that is not in the table.
    """
    if device.type == "cpu":
        return _measured_gemm(torch.float32)
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in _GPU_PEAKS.items():
        if known in name:
            return half if PRECISIONS[precision].master_weights else single
    return None


def _measured_gemm(dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> float:
    left, right = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * size**3 / fastest
