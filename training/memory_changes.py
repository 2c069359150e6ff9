"""Changes of a run that need less memory per rank, the cheapest first. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from configs.errors import InputError
from configs.rules import problems
from configs.schema import Parallel, RunConfig, Train
from parallel.layout import Layout


@dataclass(frozen=True)
class MemoryChange:
    """One legal change of a run.

    Attributes:
        key: The key to change.
        old, new: Its value now and then, as in a run file.
        config: The run with it.
        layout: The layout with it.
        needs_ranks: Ranks to start, if it takes another number of them.
    """

    key: str
    old: str
    new: str
    config: RunConfig
    layout: Layout
    needs_ranks: int | None

    def to_json(self) -> dict[str, str | int]:
        """Return the change, and the ranks with it."""
        return {"key": self.key, "old": self.old, "new": self.new, "ranks": self.layout.world_size}


def memory_changes(config: RunConfig, *, layout: Layout, on_gpu: bool) -> list[MemoryChange]:
    """Return what makes a rank need less memory, in the order in which to try it; nothing that the run has already.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        on_gpu: Whether the ranks have GPUs, so that there is other memory to move the optimizer's state to.
    """
    train, parallel = config.train, config.parallel
    found = [
        _first_legal(config, layout, "parallel.offload", [] if on_gpu or parallel.offload == "none" else ["none"]),
        _first_legal(config, layout, "train.micro_batch", list(_smaller(train.micro_batch))),
        _first_legal(config, layout, "train.recompute", [] if train.recompute else [True]),
        *(
            _first_legal(config, layout, "parallel.zero", [zero])
            # One data rank has nobody to share with.
            for zero in range(parallel.zero + 1, 4 if layout.data > 1 else 0)
        ),
        _first_legal(config, layout, "parallel.offload", ["cpu"] if on_gpu and parallel.offload == "none" else []),
        _first_legal(config, layout, "parallel.tensor", range(parallel.tensor + 1, config.model.heads + 1)),
        _first_legal(config, layout, "parallel.pipeline", range(parallel.pipeline + 1, config.model.layers + 1)),
    ]
    return [change for change in found if change is not None]


def change_lines(changes: list[MemoryChange]) -> list[str]:
    """Return a line per key: `parallel.zero 1 -> 2 or 3`."""
    return [_line(list(group)) for _, group in groupby(changes, key=attrgetter("key"))]


def _line(changes: list[MemoryChange]) -> str:
    first = changes[0]
    ranks = f", with {first.needs_ranks} ranks" if first.needs_ranks else ""
    return f"{first.key} {first.old} -> {' or '.join(change.new for change in changes)}{ranks}"


def _smaller(micro_batch: int) -> Iterator[int]:
    # half of it first: the usual step
    if micro_batch % 2 == 0:
        yield micro_batch // 2
    yield from range(micro_batch - 1, 0, -1)


def _first_legal(
    config: RunConfig, layout: Layout, key: str, values: "range | list[int] | list[bool] | list[str]"
) -> MemoryChange | None:
    """Return the change to the first value that is legal with all else as it is, or None."""
    section_name, _, name = key.partition(".")
    section: Train | Parallel = getattr(config, section_name)
    for value in values:
        changed = config.model_copy(update={section_name: section.model_copy(update={name: value})})
        if problems(changed):
            continue
        world_size = layout.world_size
        model_ranks = changed.parallel.tensor * changed.parallel.pipeline
        if world_size % model_ranks:
            world_size = model_ranks * layout.data
        try:
            new_layout = Layout.of(changed, world_size=world_size)
        except InputError:
            continue
        needs_ranks = world_size if world_size != layout.world_size else None
        old = getattr(section, name)
        return MemoryChange(key, _as_written(old), _as_written(value), changed, new_layout, needs_ranks)
    return None


def _as_written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
