"""Read the next step's micro-batches while a step runs. Imports torch."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from configs.step_sizes import StepSize
from data_pipeline.loader import Loader

ReadStep = Callable[[int, StepSize, StepSize], list[torch.Tensor]]
_LAST_READ_SECONDS = 1.0  # longer than a read takes: Python may crash if it ends while torch works in a thread


@contextmanager
def reading_ahead(loader: Loader, *, device: torch.device) -> Iterator[ReadStep]:
    """Yield a function that reads a step as `loader.step` does, and then the step after it, in a thread.

    It takes the step's first sample and its size, and the size of the step after it.
    For a GPU, the micro-batches lie in pinned memory, from which it copies without making this process wait. An error
    of a read is raised when that step is asked for.

    Args:
        loader: The run's samples.
        device: Where the micro-batches go.
    """
    asked: queue.SimpleQueue[tuple[int, StepSize, Future[list[torch.Tensor]]] | None] = queue.SimpleQueue()
    ahead: dict[tuple[int, StepSize], Future[list[torch.Tensor]]] = {}

    def read_all() -> None:
        while (each := asked.get()) is not None:
            first_sample, size, batches = each
            try:
                batches.set_result(_ready(loader.step(first_sample, size), device))
            except BaseException as error:  # noqa: BLE001  raised where the step is asked for
                batches.set_exception(error)

    def submit(first_sample: int, size: StepSize) -> Future[list[torch.Tensor]]:
        batches: Future[list[torch.Tensor]] = Future()
        asked.put((first_sample, size, batches))
        return batches

    def step(first_sample: int, size: StepSize, size_after: StepSize) -> list[torch.Tensor]:
        batches = ahead.pop((first_sample, size), None) or submit(first_sample, size)
        ahead.clear()
        result = batches.result()
        following = (first_sample + size.batch, size_after)
        ahead[following] = submit(*following)
        return result

    # A daemon: a disk may hang, and Python waits at its end for every other thread, an executor's too.
    thread = threading.Thread(target=read_all, name="reading ahead", daemon=True)
    thread.start()
    try:
        yield step
    finally:
        asked.put(None)
        thread.join(_LAST_READ_SECONDS)


def _ready(batches: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    if device.type == "cpu":
        return batches
    torch.cuda.set_device(device)  # a new thread has GPU 0, and pinning would open it for every rank
    return [batch.pin_memory() for batch in batches]
