"""Changes of a run that need less memory per rank, the cheapest first. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter

from configs.errors import InputError
from configs.rules import problems
from configs.schema import CheckpointRules, Evaluate, Parallel, RunConfig, Train
from parallel.layout import Layout
from training.memory import estimate_memory

TOLERANCE = 1.03
"""How much more memory a change may need and still count as equal: the estimate is not more exact than that."""

RECOMPUTES: tuple[bool | str, ...] = (False, "selective", True)
"""Values of train.recompute: the more, the less memory and the more time."""


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
    """Return what may make the largest rank need less memory, in the order in which to try it.

    What clearly needs more by the estimate is left out. What needs as much is not: a rank that ran out may have done so
    before the peak of the estimate.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        on_gpu: Whether the ranks have GPUs, so that there is other memory to move the optimizer's state to.
    """
    model, train, parallel = config.model, config.train, config.parallel
    # Without DeepSpeed's buffer: a rank may run out before it is used, and in a small run it is most of the estimate.
    stages = estimate_memory(config, layout=layout, on_gpu=on_gpu, bucket=0).stages
    stage = max(stages, key=attrgetter("total"))
    largest, lengths = stage.total, sorted(config.evaluate.validation_lengths)

    def may_help(changed: RunConfig, new_layout: Layout) -> bool:
        return estimate_memory(changed, layout=new_layout, on_gpu=on_gpu, bucket=0).largest < TOLERANCE * largest

    first = partial(_first_change, config, layout, may_help=may_help)
    candidates = [
        first("evaluate.validation_lengths", [tuple(lengths[:-1])] if stage.validation and lengths else []),
        # a GPU's rank copies to another memory
        first("checkpoint.background", [False] if config.checkpoint.background and not on_gpu else []),
        first("train.micro_batch", _smaller(train.micro_batch)),
        first("parallel.sequence", [True] if parallel.tensor > 1 and not parallel.sequence else []),
        *(first("train.recompute", [more]) for more in RECOMPUTES[RECOMPUTES.index(train.recompute) + 1 :]),
        # One data rank has no other to share with.
        *(first("parallel.zero", [zero]) for zero in range(parallel.zero + 1, 4 if layout.data > 1 else 0)),
        first("parallel.offload", ["cpu"] if on_gpu and parallel.offload == "none" else []),
        first("parallel.tensor", range(parallel.tensor + 1, model.heads + 1)),
        first("parallel.pipeline", _more_stages(layout, layers=model.layers)),
    ]
    return [change for change in candidates if change is not None]


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


def _more_stages(layout: Layout, *, layers: int) -> list[int]:
    """Return the numbers of stages of which the largest gets fewer layers; first those that take no more ranks."""
    numbers = range(layout.pipeline + 1, layers + 1)
    useful = [stages for stages in numbers if -(-layers // stages) < -(-layers // (stages - 1))]
    return sorted(useful, key=lambda stages: layout.world_size % (layout.tensor * stages) > 0)


def _first_change(
    config: RunConfig,
    layout: Layout,
    key: str,
    values: Iterable[int | str | tuple[int, ...]],
    *,
    may_help: Callable[[RunConfig, Layout], bool],
) -> MemoryChange | None:
    """Return the change to the first value that may help and is legal without other changes; None if there is none."""
    section_name, _, name = key.partition(".")
    section: CheckpointRules | Evaluate | Parallel | Train = getattr(config, section_name)
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
        if may_help(changed, new_layout):
            needs_ranks = world_size if world_size != layout.world_size else None
            return MemoryChange(
                key, _as_written(getattr(section, name)), _as_written(value), changed, new_layout, needs_ranks
            )
    return None


def _as_written(value: object) -> str:
    text = str([*value] if isinstance(value, tuple) else value)
    return text.lower() if isinstance(value, bool) else text
