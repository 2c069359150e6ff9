"""Record a window with torch's profiler, and read what it recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training.profiling.timeline import Interval, TimeSlice, names_around, parts_of_cpu, parts_of_gpu

_WINDOW = "trainshort profile"


def recording(device: torch.device) -> profile:
    """Return a profiler of one `window`: operations with their shapes, memory, and on a GPU the kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities, record_shapes=True, profile_memory=True)


@contextmanager
def window(device: torch.device) -> Iterator[None]:
    """Name what is profiled; a GPU's queue is empty before and after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with record_function(_WINDOW):
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def read_recording(recorded: profile, *, device: str) -> tuple[list[TimeSlice], list[Interval]]:
    """Return what each moment of the window was spent on, and the operations in it.

    Args:
        recorded: A profiler that has ended.
        device: Device type of the rank: cpu or cuda.
    """
    events = [event for event in _results(recorded).events() if event.name() != "[memory]"]
    # what the CUDA runtime does is linked to the operation that asked for it; operations are linked to nothing
    ours = [e for e in events if e.device_type().name == "CPU" and not e.linked_correlation_id()]
    (profiled,) = [_interval(event) for event in ours if event.name() == _WINDOW]
    operations = [_interval(event) for event in ours if not event.is_async() and event.name() != _WINDOW]
    if device == "cuda":
        kernels = [
            _interval(event, identity=event.linked_correlation_id())
            for event in events
            if event.device_type().name == "CUDA" and not event.is_user_annotation()
        ]
        return parts_of_gpu(kernels, window=profiled, paths=names_around(operations)), operations
    operations = [operation for operation in operations if operation.thread == profiled.thread]
    transfers = [_interval(event) for event in ours if event.is_async()]
    return parts_of_cpu(operations, window=profiled, transfers=transfers), operations


def allocation_tree(recorded: profile) -> Any:
    """Return the recorded events as a tree, allocations among them."""
    return _results(recorded).experimental_event_tree()


def _results(recorded: profile) -> Any:
    assert recorded.profiler is not None, "it has ended"
    return recorded.profiler.kineto_results


def _interval(event: Any, *, identity: int | None = None) -> Interval:
    return Interval(
        name=event.name(),
        began=event.start_ns(),
        ended=event.start_ns() + event.duration_ns(),
        thread=event.start_thread_id(),
        identity=event.correlation_id() if identity is None else identity,
        shapes=tuple(tuple(shape) for shape in event.shapes() if all(isinstance(size, int) for size in shape)),
    )
