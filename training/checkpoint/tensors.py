"""Write a safetensors file one tensor at a time, so that no rank needs a second copy of its part of the model."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint.disk import FileEntry, NewFile


class TensorFile:
    """A new safetensors file of fp32 tensors. They are added in the order of its header.

    Source: https://github.com/huggingface/safetensors, the format.
    """

    def __init__(self, path: Path, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = dict(shapes)
        self._names_left = list(shapes)
        self._file = NewFile(path)
        try:
            self._file.write(_header(shapes))
        except OSError:
            self._file.close()  # the caller has no object to close, and an open file keeps its disk space
            raise

    def add(self, name: str, value: Tensor) -> None:
        """Append the next tensor."""
        assert self._names_left.pop(0) == name, f"{name} is not the next tensor"
        assert tuple(value.shape) == self._shapes[name], f"{name} is {tuple(value.shape)}, not {self._shapes[name]}"
        flat = value.detach().to("cpu", torch.float32).contiguous().flatten()
        self._file.write(flat.numpy().view("u1").data)

    def finish(self) -> FileEntry:
        """Flush the file to disk; return its size and hash."""
        assert not self._names_left, f"{self._names_left[0]} was not added"
        return self._file.finish()

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    # 8 bytes: length of the JSON, little-endian; then the JSON; then the tensors, end to end
    entries, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * math.prod(shape)  # fp32
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return struct.pack("<Q", len(text)) + text
