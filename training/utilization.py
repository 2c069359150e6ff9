"""How much of the hardware a step used: the model's FLOPs over the peak, in the two conventions of `training.flops`."""

import math
import re
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.precisions import PRECISIONS
from configs.schema import Model
from training.flops import causal_flops_per_token, flops_per_token

# Dense peaks from the vendors' data sheets, FLOP/s: (16 bit, fp32 as torch runs it by default). Sheets often give the
# double, for sparse matrices. The first one that the device's name has as words wins: H100 PCIe must come before H100.
_GPU_PEAKS = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "V100S": (130e12, 16.4e12),
    "V100-PCIE": (112e12, 14e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI300X": (1307e12, 163.4e12),
}
# An RTX 3090 Ti or RTX 4090 D is another GPU, and a part of one (MIG) has a part of its peak.
_OTHER_GPUS = r"(?! (Ti|D|SUPER|Laptop)\b)(?!.* MIG\b)"


@dataclass(frozen=True)
class Utilization:
    """How much of its ranks' peak a run uses.

    Attributes:
        model: Its model.
        vocab_size: Tokens, without padding.
        peak: FLOP/s of all ranks together; None if unknown.
    """

    model: Model
    vocab_size: int
    peak: float | None

    def of(self, tokens_per_second: float, *, length: int) -> tuple[float | None, float | None]:
        """Return the share of the peak by the `full` and by the `causal` convention; None if the peak is unknown.

        Args:
            tokens_per_second: Over all ranks.
            length: Tokens of a sequence.
        """
        if not self.peak:
            return None, None
        counts = (flops_per_token, causal_flops_per_token)
        full, causal = (count(self.model, vocab_size=self.vocab_size, length=length) for count in counts)
        return tokens_per_second * full / self.peak, tokens_per_second * causal / self.peak


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
        return measured_gemm(device, torch.float32)
    name, row = torch.cuda.get_device_name(device), PRECISIONS[precision]
    multiplies_tf32 = row.fp32_products == "high" and torch.cuda.get_device_capability(device) >= (8, 0)
    for known, (half, single) in _GPU_PEAKS.items():
        if re.search(rf"\b{known}\b{_OTHER_GPUS}", name):
            return half if row.width == 2 else half / 2 if multiplies_tf32 else single
    return None


def measured_gemm(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, measured now: the fastest of five.

    It multiplies as linear layers do, by a matrix's transpose: torch has no fast fp16 product for a CPU but that.
    """
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        left @ right.t()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * size**3 / fastest
