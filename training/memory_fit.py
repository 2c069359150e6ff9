"""Compare the estimated memory of a run with what a machine has. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from configs.schema import RunConfig
from parallel.layout import Layout
from training.memory import MemoryEstimate, estimate_memory
from training.memory_changes import MemoryChange, memory_changes


@dataclass(frozen=True)
class MemoryThere:
    """The memory that one rank can have.

    Attributes:
        size: Bytes; None if nothing is known.
        name: Whose memory it is and how much, in words; if nothing is known, what to do.
        on_gpu: Whether it is a GPU's.
    """

    size: int | None
    name: str
    on_gpu: bool


@dataclass(frozen=True)
class MemoryFit:
    """Whether a run fits.

    Attributes:
        layout: How the ranks are split into axes.
        estimate: What its ranks will hold.
        there: What one rank can have.
        changes: What needs less, in the order in which to try it, each with the bytes of its largest rank; empty if
            the run fits.
    """

    layout: Layout
    estimate: MemoryEstimate
    there: MemoryThere
    changes: tuple[tuple[MemoryChange, int], ...]

    @property
    def fits(self) -> bool | None:
        """Whether the largest rank fits; None if the memory is not known."""
        return None if self.there.size is None else self.estimate.largest <= self.there.size

    def to_json(self) -> dict[str, Any]:
        """Return everything in bytes."""
        layout = self.layout
        return {
            "ranks": layout.world_size,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "zero": layout.zero,
            "device": "gpu" if self.there.on_gpu else "cpu",
            "stages": [stage.to_json() for stage in self.estimate.stages],
            "largest": self.estimate.largest,
            "offloaded": self.estimate.offloaded,
            "available": self.there.size,
            "available_from": self.there.name,
            "fits": self.fits,
            "changes": [
                {
                    "key": change.key,
                    "old": change.old,
                    "new": change.new,
                    "ranks": change.layout.world_size,
                    "largest": size,
                }
                for change, size in self.changes
            ],
        }


def fit_memory(config: RunConfig, *, layout: Layout, there: MemoryThere) -> MemoryFit:
    """Estimate a run's memory, and what to change if it does not fit.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        there: What one rank can have.
    """
    estimate = estimate_memory(config, layout=layout, on_gpu=there.on_gpu)
    changes = []
    if there.size is not None and estimate.largest > there.size:
        for change in memory_changes(config, layout=layout, on_gpu=there.on_gpu):
            then = estimate_memory(change.config, layout=change.layout, on_gpu=there.on_gpu)
            changes.append((change, then.largest))
    return MemoryFit(layout, estimate, there, tuple(changes))
