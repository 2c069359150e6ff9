"""Say when a layout with fewer tensor ranks or stages fits the GPUs too: each split costs speed. Imports no torch."""

from dataclasses import dataclass
from itertools import product

from configs.errors import InputError
from configs.figures import byte_size
from configs.rules import problems
from configs.schema import RunConfig
from parallel.layout import Layout
from training.memory import MemoryEstimate, estimate_memory

MARGIN = 0.9
"""Share of a GPU that the estimate may take: no layout of several GPUs was ever measured."""


@dataclass(frozen=True)
class SimplerLayout:
    """A layout of the same ranks with fewer tensor ranks or stages.

    Attributes:
        changes: The keys to change, as in `parallel.tensor=1`.
        layout: The layout with them.
        estimate: What its ranks will hold.
    """

    changes: tuple[str, ...]
    layout: Layout
    estimate: MemoryEstimate

    def to_json(self) -> dict[str, object]:
        """Return the changes, and the bytes of the largest rank with them."""
        return {"set": list(self.changes), "largest": self.estimate.largest}


def simpler_layout(config: RunConfig, *, layout: Layout, gpu_bytes: int) -> SimplerLayout | None:
    """Return the legal layout with the fewest splits that fits with a margin; None if that is not fewer than now.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        gpu_bytes: Memory of a GPU.
    """
    splits = product(range(1, layout.tensor + 1), range(1, layout.pipeline + 1))
    # Of layouts with equally many splits, try fewer stages first: stages cost more than tensor ranks, as they idle and
    # hold several micro-batches.
    for tensor, pipeline in sorted(splits, key=lambda split: (split[0] * split[1], split[1])):
        if tensor * pipeline >= layout.tensor * layout.pipeline:
            return None
        simpler = _with_splits(config, tensor=tensor, pipeline=pipeline, world_size=layout.world_size)
        if simpler is not None and simpler.estimate.largest <= MARGIN * gpu_bytes:
            return simpler
    return None


def _with_splits(config: RunConfig, *, tensor: int, pipeline: int, world_size: int) -> SimplerLayout | None:
    """Return the layout of these splits; None if it is not legal without other changes."""
    new = {"tensor": tensor, "pipeline": pipeline, "sequence": config.parallel.sequence and tensor > 1}
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=new)})
    if problems(changed):
        return None
    try:
        layout = Layout.of(changed, world_size=world_size)
    except InputError:
        return None
    keys = (key for key, value in new.items() if value != getattr(config.parallel, key))
    changes = tuple(f"parallel.{key}={str(new[key]).lower()}" for key in keys)
    return SimplerLayout(changes, layout, estimate_memory(changed, layout=layout, on_gpu=True))


def simpler_lines(simpler: SimplerLayout, *, gpu_bytes: int) -> list[str]:
    """Return what to say of a simpler layout, and how to set it."""
    layout, needs = simpler.layout, simpler.estimate.largest
    return [
        f"tensor {layout.tensor} x pipeline {layout.pipeline} would fit too, and each split costs speed: it needs "
        f"{byte_size(needs)} of {byte_size(gpu_bytes)} per GPU",
        f"  --set {' --set '.join(simpler.changes)}",
    ]
