"""Compare the estimated memory of a run with what a machine has. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from configs.schema import RunConfig
from parallel.layout import Layout
from training.host_memory import MemoryLimit
from training.memory import CPU_OVERHEAD, GPU_OVERHEAD, MemoryEstimate, estimate_memory, evaluation_weights
from training.memory_changes import MemoryChange, memory_changes
from training.simpler_layouts import MARGIN, SimplerLayout, simpler_layout


@dataclass(frozen=True)
class AvailableMemory:
    """The memory that one rank can have.

    Attributes:
        size: Bytes; None if nothing is known.
        name: Whose memory it is and how much, in words; if nothing is known, what to do.
        on_gpu: Whether it is a GPU's.
        host: What the machine of these GPUs has beside them; None if nothing is known.
        gpus: GPUs of that machine, one for each of its ranks.
    """

    size: int | None
    name: str
    on_gpu: bool
    host: MemoryLimit | None = None
    gpus: int = 1

    def holds(self, estimate: MemoryEstimate, *, ranks: int) -> bool | None:
        """Return whether the largest of `ranks` ranks fits; None if the memory is not known."""
        if self.size is None:
            return None
        return estimate.largest <= self.size and not self.lacks_host(estimate, ranks=ranks)

    @property
    def libraries(self) -> int:
        """Bytes that Python and libraries take before anything of a run."""
        return GPU_OVERHEAD if self.on_gpu else CPU_OVERHEAD

    @property
    def is_too_small(self) -> bool:
        """Whether no run fits; not if the memory is not known."""
        return self.size is not None and self.size <= self.libraries

    def lacks_host(self, estimate: MemoryEstimate, *, ranks: int) -> bool:
        """Return whether the ranks of a machine need more of its memory than it has; not if nothing is known of it."""
        return self.host is not None and estimate.host(ranks=min(ranks, self.gpus)) > self.host.size


@dataclass(frozen=True)
class MemoryFit:
    """Whether a run fits.

    Attributes:
        layout: How the ranks are split into axes.
        estimate: What its ranks will hold.
        available: What one rank can have.
        changes: What needs less, in the order in which to try it, each with its estimate; empty if the largest rank
            fits, and where no run does.
        simpler: A layout with fewer splits that fits the same GPUs; None if there is none, or if they are not known.
        evaluation: Bytes of the weights on the largest rank of `evaluate`.
        evaluation_ranks: Ranks of `evaluate`.
    """

    layout: Layout
    estimate: MemoryEstimate
    available: AvailableMemory
    changes: tuple[tuple[MemoryChange, MemoryEstimate], ...]
    simpler: SimplerLayout | None
    evaluation: int
    evaluation_ranks: int

    @property
    def evaluation_fits(self) -> bool | None:
        """Whether the weights leave `evaluate` room to compute on a GPU; None if none is known."""
        size = self.available.size if self.available.on_gpu else None
        return None if size is None else self.evaluation <= MARGIN * size and not self.available.is_too_small

    @property
    def fits(self) -> bool | None:
        """Whether the ranks fit; None if the memory is not known."""
        return self.available.holds(self.estimate, ranks=self.layout.world_size)

    def to_json(self) -> dict[str, Any]:
        """Return everything in bytes."""
        layout = self.layout
        return {
            "ranks": layout.world_size,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "zero": layout.zero,
            "device": "gpu" if self.available.on_gpu else "cpu",
            "stages": [stage.to_json() for stage in self.estimate.stages],
            "largest": self.estimate.largest,
            "offloaded": self.estimate.offloaded,
            "copies": self.estimate.copies,
            "available": self.available.size,
            "available_from": self.available.name,
            "fits": self.fits,
            "host_available": self.available.host and self.available.host.size,
            "changes": [{**change.to_json(), "largest": then.largest} for change, then in self.changes],
            "simpler": self.simpler and self.simpler.to_json(),
            "evaluation": {
                "ranks": self.evaluation_ranks,
                "weights": self.evaluation,
                "fits": self.evaluation_fits,
            },
        }


def fit_memory(config: RunConfig, *, layout: Layout, available: AvailableMemory) -> MemoryFit:
    """Estimate a run's memory, and what to change if it does not fit.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        available: What one rank can have.
    """
    estimate = estimate_memory(config, layout=layout, on_gpu=available.on_gpu)
    changes = []
    if available.size is not None and available.libraries < available.size < estimate.largest:
        for change in memory_changes(config, layout=layout, on_gpu=available.on_gpu):
            then = estimate_memory(change.config, layout=change.layout, on_gpu=available.on_gpu)
            if then.largest < estimate.largest:
                changes.append((change, then))
    simpler = None
    if available.on_gpu and available.size is not None:
        simpler = simpler_layout(config, layout=layout, gpu_bytes=available.size)
        if simpler and available.lacks_host(simpler.estimate, ranks=layout.world_size):
            simpler = None
    weights, ranks = evaluation_weights(config), config.evaluate.tensor * config.evaluate.pipeline
    return MemoryFit(layout, estimate, available, tuple(changes), simpler, weights, ranks)
