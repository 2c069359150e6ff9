"""Checkpoint folders: their contents, their file names, and how to find one. No torch.

    step_0000100/
        manifest.json                               format, step, layout, tensors, size and hash of each file
        config.yaml, tokenizer.model                so that the checkpoint needs no file outside its folder; or, of the
                                                    other kind, tokenizer.json and tokenizer_config.json
        stage_00_tensor_01.weight.safetensors       fp32 weights of one pipeline stage and tensor rank
        stage_00_tensor_01.exp_avg.safetensors      first moments, split in the same way
        stage_00_tensor_01.exp_avg_sq.safetensors   Adam's second moments, likewise; Muon keeps none of a matrix

A tensor has the same logical name and whole shape in every layout. The manifest records which rule split it and
which stage saved it, so any layout can read a checkpoint of any other. A checkpoint may come from a stranger: check
every value before using it, and open no file outside its folder.
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
from typing import Annotated, Any, cast, get_args

from pydantic import Field, TypeAdapter, ValidationError

from configs.errors import InputError, first_line
from configs.path_text import require_folder
from configs.paths import MANIFEST_NAME, checkpoints_folder, config_file, logs_folder
from configs.saved import typed_run
from configs.schema_problems import first_problem
from data_pipeline.hashes import joined_sha256, json_sha256
from data_pipeline.tokenizer_files import kept_names
from parallel.parameter import Rule, Shard
from training.checkpoint.disk import FileEntry, describe_file, write_file
from training.state import JsonInt, TrainState

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2
CONFIG_NAME = "config.yaml"
HASHING_THREADS = 8  # hashlib releases the GIL, so threads hash files in parallel
MAX_MANIFEST_BYTES = 1 << 26  # the manifest of a 176B model has a few hundred kilobytes
_FOLDER_NAME = re.compile(r"step_(\d{7,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")  # no slash and no leading dot: it stays in the folder

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
class SavedState(TrainState):
    """The position of training in a checkpoint, and values that a resume must reproduce.

    Attributes:
        probe_loss: Mean loss of a fixed small batch, nats per token.
        order_hash: Hash of the samples that come next.
        validation_loss: Validation loss measured after this step; None if it was not measured.
    """

    probe_loss: FiniteFloat
    order_hash: str
    validation_loss: FiniteFloat | None


@dataclass(frozen=True)
class Manifest(SavedState):
    """A checkpoint's table of contents.

    Attributes:
        tensor: Tensor ranks of the layout that saved it.
        pipeline: Stages of that layout.
        vocab_size: Tokens, without padding.
    """

    tensor: Annotated[int, Field(ge=1, lt=2**20)]
    pipeline: Annotated[int, Field(ge=1, lt=2**20)]
    vocab_size: JsonInt
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    @property
    def tokenizer_name(self) -> str:
        """Name of the file that the tokenizer is loaded from."""
        return kept_names(self.files)[0]

    @property
    def tokenizer_sha256(self) -> str:
        """Hash that identifies the tokenizer."""
        return joined_sha256(self.files[name].sha256 for name in kept_names(self.files))


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder named like a checkpoint, whole or broken."""

    path: Path
    step: int


class NoCheckpoint(InputError):
    """A folder is something else than a checkpoint."""


FolderCheck = Callable[[Path], Manifest]
"""Returns the manifest of a checkpoint folder, or raises InputError if the checkpoint is broken."""


def file_name(*, stage: int, tensor: int, kind: str) -> str:
    """Return the file name of one stage, tensor rank and kind of state."""
    return f"stage_{stage:02d}_tensor_{tensor:02d}.{kind}.safetensors"


def step_folder(checkpoints: Path, *, step: int) -> Path:
    """Return the folder of a step."""
    return checkpoints / f"step_{step:07d}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder has the name of a checkpoint."""
    return _FOLDER_NAME.fullmatch(name) is not None


def list_checkpoints(run_dir: Path) -> list[CheckpointFolder]:
    """Return the checkpoints of a run folder, oldest first.

    Unfinished ones are left out: their names begin with a dot. A folder that lost its manifest is included, so that
    it is reported as broken rather than overlooked.
    """
    parent = checkpoints_folder(run_dir)
    if not parent.is_dir():
        return []
    matches = [(match, path) for path in parent.iterdir() if (match := _FOLDER_NAME.fullmatch(path.name))]
    folders = [CheckpointFolder(path, int(match[1])) for match, path in matches if path.is_dir()]
    return sorted(folders, key=lambda folder: folder.step)


def candidate_folders(path: Path) -> list[Path]:
    """Return a checkpoint folder itself, or the checkpoints of a run folder, newest first; named as the path is.

    Raises:
        InputError: there is no checkpoint.
    """
    require_folder(path, what="checkpoint", advice="give a folder of RUN_DIR/checkpoints, or RUN_DIR")
    newest_first = [folder.path for folder in reversed(list_checkpoints(path))]
    # a run whose start was cut short has logs/ but no checkpoints/ yet
    is_run = checkpoints_folder(path).is_dir() or logs_folder(path).is_dir()
    if is_run and not newest_first:
        how = f" with `trainshort train {typed_run(path)}`" if config_file(path).is_file() else ""
        raise InputError(f"{path} has no checkpoint yet: train it first{how}")
    return newest_first or [_below_run_folder(path)]


def _below_run_folder(path: Path) -> Path:
    """Return the path of a checkpoint as it is if its parents lead to the run folder, else another one that does."""
    if path.is_symlink():
        return _below_run_folder(path.parent / path.readlink())
    if ".." in path.parts[-2:]:
        return path.resolve()
    return path if len(path.parts) > 1 else path.absolute()


def first_whole(folders: Sequence[Path], *, check: FolderCheck, warn: bool = True) -> tuple[Path, Manifest]:
    """Return the first whole checkpoint and its manifest; skip broken ones and leave them in place.

    Args:
        folders: Folders to try in order, at least one.
        check: Checks one folder and returns its manifest.
        warn: Whether to warn about each that is skipped: no, if a later check of the same start does. If none is
            whole, the warnings explain the error.
    Raises:
        InputError: none is whole.
    """
    problems: list[str] = []
    for folder in folders:
        try:
            manifest = check(folder)
        except InputError as error:
            if len(folders) == 1:
                raise
            problems.append(str(error).rpartition(": ")[0] or str(error))  # what follows is advice on a given folder
            continue
        for problem in problems if warn else ():
            logger.warning("%s; it is skipped, and %s is used instead", problem, folder.name)
        return folder, manifest
    for problem in problems:
        logger.warning("%s", problem)
    raise InputError(f"no checkpoint in {folders[0].parent} is whole: use another run, or move it away to start over")


def find_checkpoint(path: Path, *, warn: bool = True) -> tuple[Path, Manifest]:
    """Return the checkpoint at a path, or a run folder's newest with the right file sizes, and its manifest.

    Args:
        path: A checkpoint or a run folder.
        warn: See `first_whole`.
    Raises:
        InputError: there is no checkpoint, or none is whole.
    """
    return first_whole(candidate_folders(path), check=read_manifest, warn=warn)


def require_checkpoint(path: Path) -> Path:
    """Return the folder that `find_checkpoint` finds, without its warnings: for a check before slow imports.

    Raises:
        InputError: see `find_checkpoint`.
    """
    return find_checkpoint(path, warn=False)[0]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder after checking the names and sizes of its files.

    Raises:
        InputError: it is not a checkpoint, has another format or was altered; or a file is missing or of another size.
    """
    try:
        manifest = _parse_manifest(_manifest_content(folder), folder=folder)
    except FileNotFoundError:
        raise NoCheckpoint(
            f"{folder} is not a checkpoint, it has no {MANIFEST_NAME}: give a folder of RUN_DIR/checkpoints, or RUN_DIR"
        ) from None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise InputError(
            f"checkpoint {folder} has a broken {MANIFEST_NAME} ({_reason(error)}): use another checkpoint"
        ) from None
    match = _FOLDER_NAME.fullmatch(folder.name)
    if match is not None and int(match[1]) != manifest.step:
        raise InputError(
            f"checkpoint {folder} holds step {manifest.step}, not the step of its name: rename it to "
            f"{step_folder(folder.parent, step=manifest.step).name}"
        )
    for problem in _size_problems(folder, manifest):
        raise InputError(f"{problem}: use another checkpoint")
    return manifest


def _manifest_content(folder: Path) -> bytes:
    size = _regular_size(folder / MANIFEST_NAME)
    if size is None:
        raise FileNotFoundError
    if size > MAX_MANIFEST_BYTES:  # before reading it into memory
        raise ValueError(f"it has {size} bytes")
    return (folder / MANIFEST_NAME).read_bytes()


def _parse_manifest(content: bytes, *, folder: Path) -> Manifest:
    data = json.loads(content)
    if not isinstance(data, dict):
        raise TypeError("it is not a JSON object")
    if "format" not in data:  # of prepared data, say
        raise NoCheckpoint(
            f"{folder} is not a checkpoint, its {MANIFEST_NAME} is of something else: give a folder of "
            "RUN_DIR/checkpoints, or RUN_DIR"
        )
    if data["format"] != CHECKPOINT_FORMAT:  # before the hash: another format may compute it differently
        raise InputError(
            f"checkpoint {folder} is of format {str(data['format'])[:20]}, this version reads {CHECKPOINT_FORMAT}: "
            "use the version that wrote it"
        )
    if data.pop("sha256", None) is None:
        raise ValueError("it has no sha256")
    # Compare the bytes: the hash is of values, and 1E-08 is the same value as 1e-08.
    if content != manifest_bytes(data):
        raise ValueError("it was altered: its SHA-256 differs")
    return _MANIFEST_ADAPTER.validate_python(data)


def _reason(error: Exception) -> str:
    """Return why a manifest is broken, in a few words."""
    if isinstance(error, ValidationError):
        return first_problem(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else first_line(error)


def hash_problems(folder: Path, files: dict[str, FileEntry]) -> Iterator[str]:
    """Hash files of a checkpoint, several at a time; yield a line for each whose content is not what was written."""

    def problem(name: str, entry: FileEntry) -> str | None:
        try:
            seen = describe_file(folder / name)
        except OSError as error:
            return f"checkpoint file {folder / name} cannot be read ({error.strerror})"
        if seen == entry:
            return None
        return (
            f"checkpoint file {folder / name} was altered: its SHA-256 begins with {seen.sha256[:12]}, "
            f"{entry.sha256[:12]} was written"
        )

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        yield from filter(None, pool.map(problem, files, files.values()))


def check_whole(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder after reading every byte of its files.

    Raises:
        InputError: it is broken.
    """
    manifest = read_manifest(folder)
    for problem in hash_problems(folder, manifest.files):
        raise InputError(f"{problem}: use another checkpoint")
    return manifest


def needed_files(manifest: Manifest, *, kinds: Collection[str]) -> dict[str, FileEntry]:
    """Return the files of some kinds of state, plus the files that are always needed."""
    return {
        name: entry
        for name, entry in manifest.files.items()
        if not name.endswith(".safetensors") or name.split(".")[1] in kinds
    }


def model_sha256(manifest: Manifest) -> str:
    """Return one hash of all files that a checkpoint's model is built from."""
    return json_sha256({name: entry.sha256 for name, entry in needed_files(manifest, kinds=("weight",)).items()})


def saved_shard(name: str, entry: TensorEntry, *, folder: Path) -> Shard:
    """Return the declaration of a tensor, as its checkpoint records it.

    Raises:
        InputError: its split rule is unknown.
    """
    if entry.rule not in get_args(Rule):
        raise InputError(
            f"checkpoint {folder} has a tensor with the unknown rule {entry.rule!r}: use the version that wrote it"
        )
    return Shard(name, entry.shape, cast("Rule", entry.rule), tied=entry.tied)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and flush it to disk."""
    write_file(folder / MANIFEST_NAME, [manifest_bytes({"format": CHECKPOINT_FORMAT, **asdict(manifest)})])


def manifest_bytes(data: dict[str, Any]) -> bytes:
    """Return the content of a manifest's file: its values, and the hash of their compact JSON with sorted keys."""
    return json.dumps({**data, "sha256": _hash(data)}, indent=1).encode()


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _size_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the files that are missing, differ in size from what was written, or have an illegal name."""
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            yield f"checkpoint {folder} names a file {name[:80]!r} that cannot be in it"
            return
        size = _regular_size(folder / name)
        if size != entry.bytes:
            seen = "is missing or no regular file" if size is None else f"has {size} bytes"
            yield f"checkpoint file {folder / name} {seen}, expected {entry.bytes}"
    names = {CONFIG_NAME, *kept_names(manifest.files)}
    for stage in {entry.stage for entry in manifest.tensors.values()}:
        # A forged manifest may claim any number of ranks: one rank more than there are files finds a missing file.
        ranks = range(min(manifest.tensor, len(manifest.files) + 1))
        names |= {file_name(stage=stage, tensor=rank, kind="weight") for rank in ranks}
    for name in sorted(names - manifest.files.keys()):
        yield f"checkpoint {folder} has no file {name}"


def _regular_size(path: Path) -> int | None:
    """Return the size of a regular file in bytes; None for a missing file, and for a link, which may lead anywhere."""
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


_MANIFEST_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
