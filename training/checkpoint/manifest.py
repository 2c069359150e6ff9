"""What a checkpoint folder holds and how its files are named. No torch: the command line lists by it.

    step_0000100/
        manifest.json                      format, step, layout, tensors, files with sizes and hashes
        config.yaml, tokenizer.model       the checkpoint needs nothing beside itself
        stage_00_tensor_01.weight.safetensors       fp32 weights of one pipeline stage and tensor rank
        stage_00_tensor_01.exp_avg.safetensors      Adam's moments, likewise
        stage_00_tensor_01.exp_avg_sq.safetensors

A tensor's logical name and whole shape are the same in every layout; the manifest says which rule
split it and which stage wrote it, so that any layout can read what any other saved. A checkpoint may come from
a stranger: nothing that it says is believed before it is checked, and nothing outside its folder is opened.
"""

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from configs.errors import InputError
from configs.paths import checkpoints_folder, logs_folder
from training.checkpoint.disk import FileEntry, describe_file, write_file

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
HASHED_AT_ONCE = 8  # files; hashing lets other threads run
MOST_BYTES = 1 << 26  # of a manifest; that of a 176B model has a few hundred kilobytes
_NAME = re.compile(r"step_(\d{7,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")

JsonInt = Annotated[int, Field(ge=0, lt=2**53)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor.

    Attributes:
        shape: Whole shape, without padding.
        rule: How tensor ranks split it.
        stage: Pipeline stage whose files hold it.
        tied: Whether later stages hold a copy.
    """

    shape: tuple[JsonInt, ...]
    rule: str
    stage: JsonInt
    tied: bool


@dataclass(frozen=True)
class SavedState:
    """Where training was, and what a resume must find again.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Position in the stream of samples: the data's whole resume state.
        probe_loss: Mean loss of a fixed small batch, nats per token.
        order_hash: Hash of the samples that come next.
        validation_loss: Measured after this very step; None where it was not.
    """

    step: JsonInt
    consumed_samples: JsonInt
    probe_loss: FiniteFloat
    order_hash: str
    validation_loss: FiniteFloat | None


@dataclass(frozen=True)
class Manifest(SavedState):
    """A checkpoint's table of contents.

    Attributes:
        tensor: Tensor ranks that wrote it.
        pipeline: Stages that wrote it.
        vocab_size: Tokens, without padding.
    """

    tensor: Annotated[int, Field(ge=1, lt=2**20)]
    pipeline: Annotated[int, Field(ge=1, lt=2**20)]
    vocab_size: JsonInt
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Found:
    """A folder with the name of a checkpoint, whole or not."""

    path: Path
    step: int


Check = Callable[[Path], Manifest]
"""Returns what a folder holds, or raises InputError where it is not whole."""


def file_name(*, stage: int, tensor: int, kind: str) -> str:
    """Return the file of one stage, tensor rank and kind of state."""
    return f"stage_{stage:02d}_tensor_{tensor:02d}.{kind}.safetensors"


def step_folder(checkpoints: Path, *, step: int) -> Path:
    """Return the folder of a step."""
    return checkpoints / f"step_{step:07d}"


def is_name(name: str) -> bool:
    """Return whether a folder is called like a checkpoint."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(run_dir: Path) -> list[Found]:
    """Return a run folder's checkpoints, oldest first; unfinished ones, which begin with a dot, are none.

    One that has lost its manifest is among them: it is broken, and must be named and not overlooked.
    """
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    found = [Found(path, int(match[1])) for match, path in matches if path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def candidates(path: Path) -> list[Path]:
    """Return a checkpoint folder, or those of a run folder, newest first.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        seen = "is a file" if path.is_file() else "does not exist"
        raise InputError(f"checkpoint {path} {seen}: give a folder of RUN_DIR/checkpoints, or RUN_DIR")
    found = [found.path.absolute() for found in reversed(list_checkpoints(path))]
    is_run = checkpoints_folder(path).is_dir() or logs_folder(path).is_dir()  # of a start that was cut short
    if is_run and not found:
        raise InputError(f"{path} has no checkpoint yet: train it first")
    return found or [path.absolute()]


def first_whole(folders: Sequence[Path], *, check: Check) -> tuple[Path, Manifest]:
    """Return the first checkpoint that is whole, and what it holds.

    A broken one is named in a warning and passed over; it is left where it is.

    Args:
        folders: Where to look, one at least.
        check: How thoroughly.
    Raises:
        InputError: none is whole.
    """
    for folder in folders:
        try:
            return folder, check(folder)
        except InputError as error:
            if len(folders) == 1:
                raise
            logger.warning("%s; trying the one before", error)
    raise InputError(f"no checkpoint in {folders[0].parent} is whole: move that folder away to start anew")


def find_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Return a checkpoint folder, or the newest of a run folder whose files have their sizes, and what it holds.

    Raises:
        InputError: there is none, or none is whole.
    """
    return first_whole(candidates(path), check=read_manifest)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        InputError: no checkpoint, of another format, altered, or a file that is missing or of another size.
    """
    try:
        size = _regular_size(folder / MANIFEST)
        if size is None:
            raise FileNotFoundError
        if size > MOST_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if data["format"] != CHECKPOINT_FORMAT:
            raise InputError(
                f"checkpoint {folder} is of format {str(data['format'])[:20]}, this version reads {CHECKPOINT_FORMAT}: "
                "use the version that wrote it"
            )
        if data.pop("sha256") != _hash(data):
            raise ValueError("it was altered: its SHA-256 is another")
        manifest = _ADAPTER.validate_python(data)
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no checkpoint, it has no {MANIFEST}: give a folder of RUN_DIR/checkpoints, or RUN_DIR"
        ) from None
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else repr(error)[:200]
        raise InputError(f"checkpoint {folder} has a broken {MANIFEST} ({reason}): use another checkpoint") from None
    named = _NAME.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise InputError(f"checkpoint {folder} holds step {manifest.step}, not that of its name: name it as it was")
    for problem in _size_problems(folder, manifest):
        raise InputError(f"{problem}: use another checkpoint")
    return manifest


def hash_problems(folder: Path, files: dict[str, FileEntry]) -> Iterator[str]:
    """Yield what is wrong with the bytes of a checkpoint's files, whose sizes are right; read several at a time."""

    def problem(name: str, entry: FileEntry) -> str | None:
        try:
            found = describe_file(folder / name)
        except OSError as error:
            return f"checkpoint file {folder / name} cannot be read ({error.strerror})"
        return (
            None
            if found == entry
            else (
                f"checkpoint file {folder / name} was altered: its SHA-256 begins with {found.sha256[:12]}, "
                f"{entry.sha256[:12]} was written"
            )
        )

    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        yield from filter(None, pool.map(problem, files, files.values()))


def check_whole(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder after reading every byte of it.

    Raises:
        InputError: it is not whole.
    """
    manifest = read_manifest(folder)
    for problem in hash_problems(folder, manifest.files):
        raise InputError(f"{problem}: use another checkpoint")
    return manifest


def needed_files(manifest: Manifest, *, kinds: Collection[str]) -> dict[str, FileEntry]:
    """Return the files that hold some kinds of state, and those that are always needed."""
    return {
        name: entry
        for name, entry in manifest.files.items()
        if not name.endswith(".safetensors") or name.split(".")[1] in kinds
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a checkpoint, to disk."""
    write_file(folder / MANIFEST, [sealed({"format": CHECKPOINT_FORMAT, **asdict(manifest)})])


def sealed(data: dict[str, Any]) -> bytes:
    """Return a manifest's values as its file holds them: with the hash of their compact JSON, keys sorted."""
    return json.dumps({**data, "sha256": _hash(data)}, indent=1).encode()


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _size_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the files that are not there as they were written, and those that no checkpoint can have."""
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            yield f"checkpoint {folder} names a file {name[:80]!r} that cannot lie in it"
            return
        size = _regular_size(folder / name)
        if size != entry.bytes:
            seen = "is missing or no regular file" if size is None else f"has {size} bytes"
            yield f"checkpoint file {folder / name} {seen}, expected {entry.bytes}"
    names = {CONFIG, TOKENIZER}
    for stage in {entry.stage for entry in manifest.tensors.values()}:
        # a layout of more ranks than there are files is missing one among the first
        ranks = range(min(manifest.tensor, len(manifest.files) + 1))
        names |= {file_name(stage=stage, tensor=rank, kind="weight") for rank in ranks}
    for name in sorted(names - manifest.files.keys()):
        yield f"checkpoint {folder} has no file {name}"


def _regular_size(path: Path) -> int | None:
    """Return a file's size in bytes; None for what is missing, and for a link, which may lead anywhere."""
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, problem['loc']))[:100]}: {problem['msg']}"


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
