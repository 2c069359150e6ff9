"""The largest tensors of a step: what was allocated at its peak, from the profiler's memory events."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SHOWN_TENSORS = 8
_ALLOCATION = "_EventType.Allocation"
# what makes a tensor without saying what for
_MAKERS = ("empty", "zeros", "ones", "full", "new_", "clone", "contiguous", "to", "_to_copy", "resize_", "copy_")


@dataclass(frozen=True)
class LargeTensor:
    """Tensors of one origin and size that are alive together.

    Attributes:
        name: The operation that made them and the range around it, or the parameter.
        size: Bytes of one.
        count: How many there are.
        held: Whether they stay between steps.
    """

    name: str
    size: int
    count: int
    held: bool


def largest_tensors(tree: Iterable[Any], *, device: str, held: Mapping[str, Tensor]) -> list[LargeTensor]:
    """Return the largest tensors at the peak of what a step allocates, and the largest of those that stay.

    Args:
        tree: Events as `experimental_event_tree` of a profiler's result gives them; memory must have been profiled.
        device: Device type: cpu or cuda.
        held: Parameters by name.
    """
    living: dict[int, tuple[str, int]] = {}
    total = peak = 0
    at_peak: Counter[tuple[str, int]] = Counter()
    rising = False
    for address, size, name in _allocations(tree, device=device):
        if size > 0:
            living[address], rising = (name, size), True
            total += size
        elif address in living:  # what was allocated before the profile began stays unknown
            if rising and total > peak:
                peak, at_peak = total, Counter(living.values())
            rising = False
            total -= living.pop(address)[1]
    if total > peak:
        at_peak = Counter(living.values())
    tensors = [LargeTensor(name, size, count, held=False) for (name, size), count in at_peak.items()]
    tensors += [LargeTensor(name, _bytes(value), 1, held=True) for name, value in held.items()]
    return sorted(tensors, key=lambda each: -each.size * each.count)[:SHOWN_TENSORS]


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _allocations(tree: Iterable[Any], *, device: str) -> Iterator[tuple[int, int, str]]:
    """Yield address, bytes (negative if freed) and origin of each allocation, in the order of time."""
    changes = []
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if str(kind) == _ALLOCATION and fields.device.type == device:
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, event))
    for _, address, size, event in sorted(changes, key=lambda each: each[0]):
        yield address, size, _origin(event) if size > 0 else ""


def _origin(event: Any) -> str:
    names = []
    while (event := event.parent) is not None:
        names.append(event.name)
    ranges = [name for name in names if not name.startswith(("aten::", "autograd::"))]
    made = [name for name in names if name.startswith("aten::")]
    telling = [name for name in made if not name.removeprefix("aten::").startswith(_MAKERS)] or made
    operation = telling[0] if telling else "no operation"
    return f"{operation} in {ranges[0]}" if len(ranges) > 1 else operation  # the last range is the whole profile
