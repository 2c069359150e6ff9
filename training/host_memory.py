"""This machine's memory: what this process holds, what limits it, whom the kernel killed for it. Imports no torch."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        return f"{in_gigabytes(self.size)}, {self.name}"


def in_gigabytes(size: float) -> str:
    """Return bytes as a user reads them: 1.93 GB, of 10^9 bytes each."""
    return f"{size / 1e9:.2f} GB"


def address_space_bytes() -> int:
    """Return the address space of this process, which `ulimit -v` limits."""
    return int((PROC / "self/statm").read_text().split()[0]) * resource.getpagesize()


def host_limit() -> MemoryLimit:
    """Return the smallest limit of this process: ulimit -v, its cgroups', or the machine's memory."""
    limits = [MemoryLimit(_machine_bytes(), "this machine's memory")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(MemoryLimit(address_space, ADDRESS_SPACE))
    for folder in _cgroups():
        size = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if size:
            limits.append(MemoryLimit(size, "the limit of its cgroup: of the container, or of the job"))
    return min(limits, key=lambda limit: limit.size)


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for lack of memory, here since it started; None if unknown.

    Counts those of this process's cgroup and, where it is shown, of the machine.
    """
    counts = [_counted(PROC / "vmstat", "oom_kill")]
    for folder in _cgroups():
        counts += [_counted(folder / name, "oom_kill") for name in ("memory.events", "memory.oom_control")]
    seen = [count for count in counts if count is not None]
    return sum(seen) if seen else None


def _machine_bytes() -> int:
    return (_counted(PROC / "meminfo", "MemTotal:") or 0) * 1024


def _cgroups() -> Iterator[Path]:
    """Yield the folders of this process's memory cgroup and of those around it, of version 1 and of version 2."""
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
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root) and each.is_dir())


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
