"""How much of the hardware a step used: model FLOPs by the published convention over the peak."""

import time

import torch

from configs.schema import Model, Precision

# Dense peaks from the vendors' data sheets, FLOP/s: (16 bit, fp32 as torch runs it by default).
_GPU_PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "V100": (125e12, 15.7e12),
    "L40S": (362e12, 91.6e12),
    "B200": (2250e12, 80e12),
}


def flops_per_token(model: Model, *, parameters: int, length: int) -> float:
    """Return forward and backward FLOPs of one token: 6 N + 12 layers x hidden x length.

    Attention is counted in full, not halved for causality, as the published figures do. Recomputation is not counted.
    """
    return 6.0 * parameters + 12.0 * model.layers * model.hidden * length


def peak_flops(device: torch.device, *, precision: Precision) -> float | None:
    """Return the peak FLOP/s of this rank's device: a GPU's from its data sheet, a CPU's measured now.

    None for a GPU that the table does not know. CPU ranks should measure at the same time, since they share cores.
    """
    if device.type == "cpu":
        return _measured_gemm(torch.float32)
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in _GPU_PEAKS.items():
        if known in name:
            return single if precision == "fp32" else half
    return None


def _measured_gemm(dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> float:
    left, right = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * size**3 / fastest
