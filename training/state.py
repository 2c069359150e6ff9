"""The position of training, which a checkpoint records and a resume continues from. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

# Many JSON readers hold numbers as fp64, which is exact below 2**53.
JsonInt = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class TrainState:
    """The position of training: all that survives a restart besides weights and optimizer state.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Samples that these steps were trained on.
        left_out_samples: Samples of the stream before this position that no step was trained on, because training
            diverged on them.
        loss_scale: Factor of the loss in the last of these steps; None before the first, and in a precision without.
    """

    step: JsonInt
    consumed_samples: JsonInt
    left_out_samples: JsonInt = field(default=0, kw_only=True)
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = field(default=None, kw_only=True)

    @property
    def next_sample(self) -> int:
        """Place of the next sample in the stream, from 0."""
        return self.consumed_samples + self.left_out_samples
