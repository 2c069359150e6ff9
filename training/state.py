"""The position of training, which a checkpoint records and a resume continues from. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

# Many JSON readers hold numbers as fp64, which is exact below 2**53.
JsonInt = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class TrainState:
    """The position of training: all that survives a restart besides weights and optimizer state.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Position in the stream of samples, the whole resume state of the data.
    """

    step: JsonInt
    consumed_samples: JsonInt
