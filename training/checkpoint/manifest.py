"""What a checkpoint folder holds and how its files are named. No torch: the command line lists by it.

    step_0000100/
        manifest.json                      format, step, layout, tensors, files with sizes and hashes
        config.yaml, tokenizer.model       the checkpoint needs nothing beside itself
        stage_00_tensor_01.weight.safetensors       fp32 weights of one pipeline stage and tensor rank
        stage_00_tensor_01.exp_avg.safetensors      Adam's moments, likewise
        stage_00_tensor_01.exp_avg_sq.safetensors

A tensor's logical name and whole shape are the same in every layout; the manifest says which rule
split it and which stage wrote it, so that any layout can read what any other saved.
"""

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import checkpoints_folder
from data_pipeline.atomic import whole_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor: whole shape, split rule, and the pipeline stage whose files hold it."""

    shape: tuple[int, ...]
    rule: str
    stage: int


@dataclass(frozen=True)
class FileEntry:
    """One file: size in bytes and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Position in the stream of samples: the data's whole resume state.
        tensor: Tensor ranks that wrote it.
        pipeline: Stages that wrote it.
        vocab_size: Tokens, without padding.
    """

    step: int
    consumed_samples: int
    tensor: int
    pipeline: int
    vocab_size: int
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Found:
    """A checkpoint folder with a manifest."""

    path: Path
    step: int


def file_name(*, stage: int, tensor: int, kind: str) -> str:
    """Return the file of one stage, tensor rank and kind of state."""
    return f"stage_{stage:02d}_tensor_{tensor:02d}.{kind}.safetensors"


def step_folder(checkpoints: Path, *, step: int) -> Path:
    """Return the folder of a step."""
    return checkpoints / f"step_{step:07d}"


def list_checkpoints(run_dir: Path) -> list[Found]:
    """Return a run folder's checkpoints, oldest first; unfinished ones, which begin with a dot, are none."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    found = [Found(path, int(match[1])) for match, path in matches if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Return a checkpoint folder, or the newest whole one of a run folder, and what it holds.

    A broken one of a run folder is named in a warning and passed over; it is left where it is.

    Raises:
        InputError: there is none, or none is whole.
    """
    if not path.is_dir():
        raise InputError(f"checkpoint {path} does not exist: give a folder of RUN_DIR/checkpoints, or RUN_DIR")
    if checkpoints_folder(path).is_dir() and not list_checkpoints(path):
        raise InputError(f"{path} has no checkpoint yet: train it first")
    *older, newest = [found.path.absolute() for found in list_checkpoints(path)] or [path.absolute()]
    try:
        return newest, read_manifest(newest)
    except InputError as error:
        if not older:
            raise
        logger.warning("%s; trying the one before", error)
    for folder in reversed(older):
        with suppress(InputError):
            return folder, read_manifest(folder)
    raise InputError(f"no checkpoint of {path} is whole: move its checkpoints folder away to start anew")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        InputError: no checkpoint, of another format, or a file that is missing or of another size.
    """
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT_VERSION:
            raise InputError(f"checkpoint {folder} is of another format: use the version that wrote it")
        tensors = {
            name: TensorEntry(tuple(entry["shape"]), entry["rule"], entry["stage"])
            for name, entry in data.pop("tensors").items()
        }
        files = {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
        manifest = Manifest(tensors=tensors, files=files, **data)
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no checkpoint, it has no {MANIFEST}: give a folder of RUN_DIR/checkpoints, or RUN_DIR"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(f"checkpoint {folder} has a broken {MANIFEST} ({error}): use another checkpoint") from None
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.parent == folder and path.is_file() else None
        if size != entry.bytes:
            raise InputError(f"checkpoint file {path} has {size} bytes, expected {entry.bytes}: use another checkpoint")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a checkpoint, to disk."""
    text = json.dumps({"format": FORMAT_VERSION, **asdict(manifest)}, indent=1)
    with whole_file(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and hash of a file, waiting until the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
