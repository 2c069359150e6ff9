"""Precisions of training, evaluation and generation, and everything that depends on them. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import InputError

DEFAULT_PRECISION = "fp32"


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: Value of `train.precision` and `--precision`.
        dtype: Torch dtype of the forward and backward pass, by name.
        master_weights: Whether ZeRO keeps fp32 weights in addition to those of the forward pass.
        deepspeed: Its part of DeepSpeed's configuration.
        row_tolerance: How far a measured attention row may be from the exact one, in total variation.
        resume_tolerance: How far the check loss may be from the saved one, in nats per token. Layouts and attention
            backends differ by about 1e-6 in fp32, and by the rounding of the weights in 16 bits.
        scales_loss: Whether training multiplies the loss, so that small gradients stay above the smallest number.
        gpu_only: Whether a CPU cannot compute in it.
        fp32_products: How a GPU multiplies fp32 matrices, as torch.set_float32_matmul_precision takes it.
        orthogonalizes_in: Torch dtype of Muon's products, by name; they bear the rounding of 16 bits, not fp16's range.
    """

    name: str
    dtype: str
    master_weights: bool
    deepspeed: Mapping[str, Any]
    row_tolerance: float
    resume_tolerance: float
    scales_loss: bool = False
    gpu_only: bool = False
    fp32_products: str = "highest"
    orthogonalizes_in: str = "float32"

    @property
    def width(self) -> int:
        """Bytes of an element in the forward and backward pass."""
        return 2 if self.dtype.endswith("16") else 4

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the forward pass's type."""
        return {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[self.dtype]


# Otherwise DeepSpeed adds gradients up in 16 bits: over micro-batches, and over data ranks.
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}

PRECISIONS = {
    row.name: row
    for row in (
        Precision(
            "fp32",
            dtype="float32",
            master_weights=False,
            deepspeed={},
            row_tolerance=1e-5,
            resume_tolerance=1e-4,
        ),
        Precision(
            "bf16",
            dtype="bfloat16",
            master_weights=True,
            deepspeed={"bf16": {"enabled": True}, **_FP32_SUMS},
            row_tolerance=3e-3,
            resume_tolerance=0.05,
            orthogonalizes_in="bfloat16",
        ),
        Precision(
            "fp16",
            dtype="float16",
            master_weights=True,
            deepspeed={"fp16": {"enabled": True, "loss_scale": 1.0}, **_FP32_SUMS},  # the engine sets another scale
            row_tolerance=1e-3,
            resume_tolerance=0.05,
            scales_loss=True,
        ),
        Precision(
            "tf32",  # fp32 weights, multiplied with 10 bits of mantissa where bf16 has 7
            dtype="float32",
            master_weights=False,
            deepspeed={},
            row_tolerance=1e-3,
            resume_tolerance=1e-3,
            gpu_only=True,
            fp32_products="high",
        ),
    )
}


def require_precision(name: str) -> Precision:
    """Return the precision for a value of `--precision`.

    Raises:
        InputError: it is not known.
    """
    if name not in PRECISIONS:
        words = [f"{row.name} (on a GPU)" if row.gpu_only else row.name for row in PRECISIONS.values()]
        raise InputError(f"precision {name!r} is not known: use {' or '.join(words)}")
    return PRECISIONS[name]


def require_device(name: str, *, device: str, key: str = "precision") -> Precision:
    """Return the precision for a value of `--precision` or another key, on a type of device: cpu or cuda.

    Raises:
        InputError: it is not known, or needs a GPU.
    """
    row = require_precision(name)
    if row.gpu_only and device == "cpu":
        raise InputError(f"{key} {name} needs a GPU, and this machine has none: use {DEFAULT_PRECISION}")
    return row
