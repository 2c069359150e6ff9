"""Read the next step's micro-batches while a step runs. Imports torch."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from data_pipeline.loader import Loader

ReadStep = Callable[[int], list[torch.Tensor]]


@contextmanager
def reading_ahead(loader: Loader, *, device: torch.device) -> Iterator[ReadStep]:
    """Yield a function like `loader.step` that then reads the step after it, in a thread.

    For a GPU, the micro-batches lie in pinned memory, from which it copies without making this process wait. An error
    of a read is raised when that step is asked for.

    Args:
        loader: The run's samples.
        device: Where the micro-batches go.
    """

    def enter_thread() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread has GPU 0, and pinning would open it for every rank

    def read(consumed_samples: int) -> list[torch.Tensor]:
        batches = loader.step(consumed_samples)
        return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches

    thread = ThreadPoolExecutor(1, "reading ahead", initializer=enter_thread)
    ahead: dict[int, Future[list[torch.Tensor]]] = {}

    def step(consumed_samples: int) -> list[torch.Tensor]:
        batches = ahead.pop(consumed_samples, None) or thread.submit(read, consumed_samples)
        ahead.clear()
        result = batches.result()
        following = consumed_samples + loader.global_batch
        ahead[following] = thread.submit(read, following)
        return result

    try:
        yield step
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # a disk may hang, and nobody needs this step
