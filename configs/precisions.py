"""Training precisions, and everything that depends on them. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: Value of `train.precision`.
        dtype: Torch dtype of the forward and backward pass, by name.
        master_weights: Whether ZeRO keeps fp32 weights in addition to those of the forward pass.
        deepspeed: Its part of DeepSpeed's configuration.
        row_tolerance: How far a measured attention row may be from the exact one, in total variation.
        resume_tolerance: How far the check loss may be from the saved one, in nats per token. Layouts and attention
            backends differ by about 1e-6 in fp32, and by the rounding of the weights in 16 bits.
        available: Whether this version supports it.
    """

    name: str
    dtype: str
    master_weights: bool
    deepspeed: Mapping[str, Any]
    row_tolerance: float
    resume_tolerance: float
    available: bool = True

    @property
    def width(self) -> int:
        """Bytes of an element in the forward and backward pass."""
        return 2 if self.dtype.endswith("16") else 4


PRECISIONS = {
    row.name: row
    for row in (
        Precision(
            "fp32",
            dtype="float32",
            master_weights=False,
            deepspeed={"bf16": {"enabled": False}},
            row_tolerance=1e-5,
            resume_tolerance=1e-4,
        ),
        Precision(
            "bf16",
            dtype="bfloat16",
            master_weights=True,
            # Without these two DeepSpeed adds gradients up in bf16: over micro-batches, and over data ranks.
            deepspeed={
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
            },
            row_tolerance=3e-3,
            resume_tolerance=0.05,
        ),
        Precision(
            "fp16",
            dtype="float16",
            master_weights=True,
            deepspeed={},
            row_tolerance=3e-3,
            resume_tolerance=0.05,
            available=False,
        ),
    )
}
