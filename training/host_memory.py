"""This machine's memory: what this process holds, what limits it, what the kernel killed. Imports no torch."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from configs.figures import byte_size

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
ADDRESS_SPACE = "the address space that ulimit -v allows"


@dataclass(frozen=True)
class MemoryLimit:
    """The least memory of those that limit this process.

    Attributes:
        size: Bytes.
        name: What sets it, and how a user raises it.
    """

    size: int
    name: str

    def __str__(self) -> str:
        return f"{byte_size(self.size)}, {self.name}"


@dataclass(frozen=True)
class OomKills:
    """How many processes the kernel has killed for lack of memory so far; None if unknown.

    Attributes:
        here: Kills in this process's cgroup: ranks are in it too.
        anywhere: Also in the cgroups around it and, where it is shown, on the machine: it may be anybody's process.
    """

    here: int | None
    anywhere: int | None


def address_space_bytes() -> int:
    """Return the address space of this process, which `ulimit -v` limits."""
    return int((PROC / "self/statm").read_text().split()[0]) * resource.getpagesize()


def host_limit() -> MemoryLimit:
    """Return the smallest limit of this process: ulimit -v, its cgroups', or the machine's memory."""
    limits = [MemoryLimit(_machine_bytes(), "this machine's memory")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(MemoryLimit(address_space, ADDRESS_SPACE))
    for folder in chain.from_iterable(_cgroups()):
        size = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if size:
            limits.append(MemoryLimit(size, "the limit of its cgroup: of the container, or of the job"))
    return min(limits, key=lambda limit: limit.size)


def oom_kills() -> OomKills:
    """Return how many processes the kernel has killed for lack of memory so far."""
    own, around = [], []
    for folder, *parents in _cgroups():
        own += _kills_in(folder)
        around += [count for parent in parents for count in _kills_in(parent)]
    machine = _counted(PROC / "vmstat", "oom_kill")
    counts = [*own, *around, *([] if machine is None else [machine])]
    return OomKills(here=sum(own) if own else None, anywhere=sum(counts) if counts else None)


def _kills_in(cgroup: Path) -> list[int]:
    counts = (_counted(cgroup / name, "oom_kill") for name in ("memory.events", "memory.oom_control"))
    return [count for count in counts if count is not None]


def _machine_bytes() -> int:
    return (_counted(PROC / "meminfo", "MemTotal:") or 0) * 1024


def _cgroups() -> Iterator[list[Path]]:
    """Yield the folders of this process's memory cgroup and of those around it, for version 1 and for version 2."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        folder = root / path.lstrip("/")
        # A container sees its own cgroup as the root, under a path that may be the host's.
        folders = [each for each in (folder, *folder.parents) if each.is_relative_to(root) and each.is_dir()]
        if folders:
            yield folders


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is no file, or `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _counted(file: Path, key: str) -> int | None:
    """Return the number after a key in a file of lines; None if it is not there."""
    try:
        fields = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return None
    return next((int(field[1]) for field in fields if len(field) > 1 and field[0] == key), None)
