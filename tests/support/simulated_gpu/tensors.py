"""Tensors that say they lie on a GPU: what computes with them, and what is noted while it does."""

import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS = Path(__file__).parents[3]
BLOCK = 512  # torch's allocator gives whole blocks of so many bytes
COPIES = {  # and which argument is copied
    torch.ops.aten._to_copy.default: 0,
    torch.ops.aten.copy_.default: 1,
}
READS = {
    torch.ops.aten._local_scalar_dense.default: 0,
    torch.ops.aten.equal.default: True,
}
FINDS = {  # and the shape of what is returned: one place, in a tensor of so many dimensions
    torch.ops.aten.nonzero.default: lambda dims: (1, dims),
    torch.ops.aten.repeat_interleave.Tensor: lambda _: (1,),
}


@dataclass
class Seen:
    """What has happened on the GPU.

    Attributes:
        waits: Where the host waited for it.
        off_device: Collectives of tensors that are not on it, and where.
        held, peak: Bytes that are held now, and the most that were.
    """

    waits: list[str] = field(default_factory=list)
    off_device: list[str] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    storages: dict[int, int] = field(default_factory=dict)

    def wait(self, what: object) -> None:
        """Note that the host waits for the GPU, and where."""
        self.waits.append(f"{what} at {place()}")

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.held += self.storages[key]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.held -= self.storages.pop(key)


class OnGpu(TorchDispatchMode):
    """Notes what operations on fake tensors do; those are computed by the mode around which it is."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        on_gpu = any(leaf.is_cuda for leaf in leaves)
        for leaf in leaves:
            leaf.constant = None  # a number that is known would really be sent to the GPU
        if func in READS or func in FINDS:
            if on_gpu:
                self._seen.wait(func)
            return READS[func] if func in READS else leaves[0].new_empty(FINDS[func](leaves[0].ndim), dtype=torch.int64)
        are_on_gpu = bool(leaves) and all(leaf.is_cuda for leaf in leaves)
        if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default and not are_on_gpu:
            self._seen.off_device.append(f"{func} at {place()}")
        result = func(*self._known(func, args), **(kwargs or {}))
        if func in COPIES and args[COPIES[func]].device != result.device and _is_waited_for(result, args, kwargs):
            self._seen.wait(func)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.is_cuda:
                self._seen.hold(leaf.untyped_storage())
        return result

    def _known(self, func: Any, args: Any) -> Any:
        """Return the arguments of an operation, with one place in place of those that truth values would give."""
        if func is not torch.ops.aten.index.Tensor:
            return args
        numbers = list[Any]()
        for index in args[1]:
            if index is None or index.dtype is not torch.bool:
                numbers.append(index)
                continue
            if index.is_cuda:
                self._seen.wait("an index of truth values")
            numbers += [index.new_empty(1, dtype=torch.int64) for _ in range(index.ndim)]
        return args[0], numbers


def _is_waited_for(copy: Tensor, args: Any, kwargs: Any) -> bool:
    return bool(copy.numel()) and not ((kwargs or {}).get("non_blocking") or any(args[2:]))


class AsFake(TorchFunctionMode):
    """Lets functions that fake tensors do not know work with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            return func(*args, **kwargs).to(device or "cpu")
        if func in (Tensor.pin_memory, Tensor.is_pinned, Tensor.record_stream):
            return {Tensor.pin_memory: args[0], Tensor.is_pinned: True}.get(func)
        result = func(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[1], FakeTensor):  # type: ignore[attr-defined]
            args[0].fake_device = args[1].fake_device
        return result


def move(module: torch.nn.Module, *to: Any) -> torch.nn.Module:
    """Stand in for `Module.to`, which swaps tensors that others know."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(*to) if to else tensor.data
    return module


def place() -> str:
    """Return where our code, or a library's that it calls, is now: the innermost three lines outside torch."""
    frame, lines = sys._getframe(1), list[str]()
    while frame is not None and len(lines) < 3:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "simulated_gpu" not in path and ("site-packages" in path or str(OURS) in path):
            lines.append(f"{path.rpartition('site-packages/')[2].removeprefix(f'{OURS}/')}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)
