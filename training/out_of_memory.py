"""Say in words that memory ran out: how much a process held, and what to change. Imports no torch.

Everything that is needed to say it is imported before memory is short.
"""

import errno
import logging
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from configs.errors import NO_MEMORY, MachineError
from configs.figures import byte_size
from training.host_memory import ADDRESS_SPACE, address_space_bytes, host_limit

logger = logging.getLogger(__name__)

# What they say when `ulimit -v` leaves no address space, and for other reasons without it.
_NO_ADDRESS_SPACE = re.compile(r"failed to map segment|can't start new thread|Resource temporarily unavailable")
_ON_GPU = re.compile(r"cuda|cublas|cudnn|nccl", re.IGNORECASE)
_WANTED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([KMGT]i?)?B(?:ytes)?\b", re.IGNORECASE)
DETAIL = "\n  "  # begins each further line of a message
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class OutOfMemory(MachineError):
    """The memory of a GPU or of the machine does not suffice."""


@contextmanager
def explain_out_of_memory(*remedies: str) -> Iterator[None]:
    """Report that a command of one process ran out of memory, and what to change.

    Args:
        remedies: What needs less memory, in the order in which to try it.
    Raises:
        OutOfMemory: says what the process held, and the remedies.
    """
    try:
        yield
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        cause = memory_error(error)
        if cause is None:
            raise
        logger.debug("out of memory", exc_info=error)
        if is_of_gpu(cause):
            remedies = (*remedies, 'CUDA_VISIBLE_DEVICES="", to compute on CPUs, in the memory of the machine')
        how = f"this command {how_it_ran_out(cause)}"
        raise OutOfMemory(with_remedies([how], remedies, on_gpu=is_of_gpu(cause))) from None


def memory_error(error: BaseException) -> BaseException | None:
    """Return the error, among this one and its causes, that says that memory ran out; None if none does."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return seen
        if isinstance(seen, RuntimeError | ImportError) and is_out_of_memory_text(str(seen)):
            return seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def is_out_of_memory_text(text: str) -> bool:
    """Return whether the words of a library say that memory ran out."""
    if host_limit().name == ADDRESS_SPACE and _NO_ADDRESS_SPACE.search(text):
        return True
    return NO_MEMORY.search(text) is not None


def with_remedies(lines: Sequence[str], remedies: Sequence[str], *, on_gpu: bool) -> str:
    """Return a message of lines and of what to change, in the order in which to try it."""
    more = "use a GPU with more memory" if on_gpu else "give it more memory"
    if not remedies:
        return DETAIL.join([*lines, more])
    changes = ["to need less memory, change the first of these that you can:", *(f"  {each}" for each in remedies)]
    return DETAIL.join([*lines, *changes, f"or {more}"])


def is_of_gpu(error: BaseException) -> bool:
    """Return whether the memory that ran out is a GPU's."""
    return _ON_GPU.search(f"{type(error).__module__} {error}") is not None


def how_it_ran_out(error: BaseException) -> str:
    """Say what this process held when it ran out of memory, what it asked for, and how much there is."""
    wanted = _WANTED.search(str(error))
    more = ""
    if wanted:
        size = float(wanted[1]) * _UNITS[(wanted[2] or "")[:1].upper()]
        more = f", and asked for {byte_size(size)} more"
    if is_of_gpu(error):
        return DETAIL.join(["ran out of GPU memory", *_held_on_gpu(more)])
    limit = host_limit()
    held = f"{byte_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory"
    if limit.name == ADDRESS_SPACE:
        held += f", {byte_size(address_space_bytes())} of address space"
    return DETAIL.join(["ran out of memory", f"held: {held}{more}", f"limit: {limit}"])


def _held_on_gpu(more: str) -> list[str]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # the error has broken the context
        return []
    outside = total - free - torch.cuda.memory_reserved()
    return [
        f"held: {byte_size(torch.cuda.max_memory_allocated())}{more}",
        f"limit: {byte_size(total)}, of cuda:{torch.cuda.current_device()}, {torch.cuda.get_device_name()}; "
        f"outside of torch {byte_size(outside)} are taken",
    ]
