"""A safetensors file that is written one tensor at a time: no rank holds its part of the model twice."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint.disk import FileEntry, NewFile


class TensorFile:
    """fp32 tensors under their names, in the order of the header.

    Source: https://github.com/huggingface/safetensors, the format.
    """

    def __init__(self, path: Path, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = dict(shapes)
        self._left = list(shapes)
        self._file = NewFile(path)
        try:
            self._file.write(_header(shapes))
        except OSError:
            self._file.close()  # nobody else has it yet, and an open file holds its space
            raise

    def add(self, name: str, value: Tensor) -> None:
        """Append the next tensor."""
        assert self._left.pop(0) == name, f"{name} is not the next tensor"
        assert tuple(value.shape) == self._shapes[name], f"{name} is {tuple(value.shape)}, not {self._shapes[name]}"
        flat = value.detach().to("cpu", torch.float32).contiguous().flatten()
        self._file.write(flat.numpy().view("u1").data)

    def finish(self) -> FileEntry:
        """Wait until the disk has the file; return its size and hash."""
        assert not self._left, f"{self._left[0]} is missing"
        return self._file.finish()

    def close(self) -> None:
        """Let go of the file, whole or not."""
        self._file.close()


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text
