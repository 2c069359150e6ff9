"""Stand-ins for `torch.cuda`, as of a machine with eight H100."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

GPUS = 8
PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, uuid="0")


class Stream:
    """A stream on which nothing runs."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def synchronize(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event(Stream):
    """An event that has happened."""

    def __init__(self, **_: Any) -> None:
        pass

    def query(self) -> bool:
        """Return that it has happened."""
        return True


@contextmanager
def _nothing(*_: object) -> Iterator[None]:
    yield


def _returns(value: Any) -> Any:
    return lambda *_, **__: value


def believe_in_gpus() -> None:
    """Let code of this process find GPUs in `torch.cuda`."""
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": GPUS,
        "current_device": 0,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": PROPERTIES,
        "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "current_stream": Stream(),
        "default_stream": Stream(),
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "_lazy_init": None,
    }.items():
        setattr(cuda, name, _returns(value))
    cuda.Stream, cuda.Event, cuda.stream, cuda.device = Stream, Event, _nothing, _nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _returns(0)
