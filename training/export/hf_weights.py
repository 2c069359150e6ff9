"""The weights of a Hugging Face folder, read when they are asked for: safetensors or torch's files, in any shards."""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import InputError, first_line

# safetensors come first: they hold no code
_FILES = ("model.safetensors", "pytorch_model.bin")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HuggingFaceWeights(Mapping[str, Tensor]):
    """The tensors of a folder by their names there, in fp32.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        """List the tensors; read none.

        Raises:
            InputError: the folder has no weights, or an index or a file that cannot be read.
        """
        self.folder = folder
        self._file_of = _files_by_name(folder)
        self._opened: tuple[Path, Any] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from its file's header.

        Raises:
            InputError: the file cannot be read.
        """
        with _reading(file := self._file_of[name]):
            opened = self._open(file)
            return tuple(opened.get_slice(name).get_shape() if _is_safetensors(file) else opened[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            InputError: the file cannot be read, or the tensor is not of floating-point numbers that fp32 holds.
        """
        with _reading(file := self._file_of[name]):
            opened = self._open(file)
            weight: Tensor = opened.get_tensor(name) if _is_safetensors(file) else opened[name]
        narrow = weight.float() if weight.dtype in _FLOATS else None
        if narrow is None or not torch.equal(narrow.to(weight.dtype), weight):
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(
                f"{file} has {name} in {kind}, or values that fp32 cannot hold: give a checkpoint in fp32, bf16 or fp16"
            )
        return narrow

    def _open(self, file: Path) -> Any:
        """Return a file that stays open until another is asked for."""
        if self._opened is None or self._opened[0] != file:
            opened: Any = safe_open(file, framework="pt") if _is_safetensors(file) else _load_pickle(file)
            self._opened = file, opened
        return self._opened[1]


def _is_safetensors(file: Path) -> bool:
    return file.suffix == ".safetensors"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what the two libraries raise into one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): download it again") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} is a pickle that holds more than tensors, and could run code: convert it to safetensors where you "
            "trust it"
        ) from None


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return dict.fromkeys(_names_in(folder / name), folder / name)
        if index.is_file():
            return _indexed(index)
    raise InputError(f"{folder} has no weights: it needs {' or '.join(_FILES)}, or their index with its shards")


def _indexed(index: Path) -> dict[str, Path]:
    try:
        table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / Path(file).name for name, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({first_line(error)}): download it again") from None
    for file in sorted({*files.values()}):
        if not file.is_file():
            raise InputError(f"{index.parent} lacks {file.name}, which its index names: download it again")
        names = {name for name, place in files.items() if place == file}
        if differing := sorted(names ^ {*_names_in(file)}):
            raise InputError(f"{file} and its index differ in {differing[0]}: download both again")
    return files


def _names_in(file: Path) -> list[str]:
    with _reading(file):
        if _is_safetensors(file):
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        return list(_load_pickle(file))


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of torch's own file without running code in it."""
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not (isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())):
        raise pickle.UnpicklingError
    return loaded
