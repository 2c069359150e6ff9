"""Where `benchmarks.gpu` measures, how large, and how it times an action."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from configs.backends import BACKENDS, installed_packages, unavailable

Row = dict[str, Any]
Variant = tuple[str, Callable[[], Row]]  # its name, and what measures it


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        overrides: Keys of the large model's shape.
        small: Keys of the small one's.
        vocab_size: Tokens.
        length: The training length; the long one is twice that.
        micro_batch: Sequences of `length` in a micro-batch.
        micro_batches: In a step.
        attention_lengths: Lengths of the attention alone.
        window_lengths: Lengths of the attention with lossless windows.
        attention_tokens: Tokens of an attention, over a batch.
        decoded: Tokens to decode.
    """

    overrides: tuple[str, ...]
    small: tuple[str, ...]
    vocab_size: int
    length: int
    micro_batch: int
    micro_batches: int
    attention_lengths: tuple[int, ...]
    window_lengths: tuple[int, ...]
    attention_tokens: int
    decoded: int


FULL = Sizes((), (), 50304, 1024, 8, 16, (1024, 2048, 8192), (8192, 2048, 32768), 16384, 128)
_TINY_SHAPE = ("model.layers=1", "model.hidden=32", "model.heads=2", "model.feed_forward=64", "train.precision=fp32")
TINY = Sizes(_TINY_SHAPE, _TINY_SHAPE, 320, 16, 2, 2, (32,), (32,), 32, 4)


@dataclass(frozen=True)
class Lab:
    """Where to measure, and how large."""

    device: torch.device
    sizes: Sizes

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], *, repeats: int, in_a_row: int = 1) -> float:
        """Return the median time of an action, after one warm-up.

        Args:
            action: What to time.
            repeats: Times that are taken.
            in_a_row: Actions of each: a GPU that is given many does not wait for the host, as in training.
        """
        action()
        self.wait()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            for _ in range(in_a_row):
                action()
            self.wait()
            times.append((time.perf_counter() - began) / in_a_row)
        return median(times)

    def forget(self) -> None:
        """Free what the last variant held, and count the peak from here on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """Return the peak of allocated memory; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 1) if self.device.type == "cuda" else None

    def runs(self, backend: str) -> bool:
        """Return whether an attention backend runs here."""
        return unavailable(BACKENDS[backend], device=self.device.type, packages=installed_packages()) is None
