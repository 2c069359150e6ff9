"""`trainshort checkpoint list` and `verify`: which checkpoints are whole, what is wrong with the others. No torch."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.choices import OPTIMIZERS
from configs.errors import InputError
from configs.load import load_run
from configs.path_text import require_folder
from configs.paths import MANIFEST_NAME
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    NoCheckpoint,
    candidate_folders,
    hash_problems,
    is_checkpoint_name,
    list_checkpoints,
    read_manifest,
    saved_shard,
)


@dataclass(frozen=True)
class Verdict:
    """The result of checking one checkpoint.

    Attributes:
        path: Its folder.
        manifest: Its table of contents; None if it cannot be read.
        problems: What is wrong, one line each; empty if no check failed.
    """

    path: Path
    manifest: Manifest | None
    problems: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(entry.bytes for entry in self.manifest.files.values()) if self.manifest else 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        number = re.search(r"\d+", self.path.name)
        return {
            "step": self.manifest.step if self.manifest else int(number[0]) if number else None,
            "path": str(self.path),
            "whole": not self.problems,
            "problems": list(self.problems),
            "bytes": self.bytes,
            "tensor": self.manifest.tensor if self.manifest else None,
            "pipeline": self.manifest.pipeline if self.manifest else None,
            "probe_loss": self.manifest.probe_loss if self.manifest else None,
            "validation_loss": self.manifest.validation_loss if self.manifest else None,
        }


def list_verdicts(path: Path) -> list[Verdict]:
    """Check the file sizes of a checkpoint, or of each checkpoint of a run folder, oldest first.

    Raises:
        InputError: there is no such folder.
    """
    require_folder(path, what="run folder", advice="give the run.dir of a run")
    if (path / MANIFEST_NAME).is_file() or is_checkpoint_name(path.name):
        return [_check_sizes(path)]
    _require_run_folder(path)
    return [_check_sizes(folder.path) for folder in list_checkpoints(path)]


def verify_checkpoints(path: Path) -> list[Verdict]:
    """Read every byte of a checkpoint, or of each checkpoint of a run folder, oldest first.

    Raises:
        InputError: there is no checkpoint.
    """
    folders = candidate_folders(path)
    _require_run_folder(path)
    return [_check_bytes(folder) for folder in reversed(folders)]


def _require_run_folder(path: Path) -> None:
    """Refuse RUN_DIR/checkpoints, in which a run's checkpoints would not be found.

    Raises:
        InputError: the folder holds checkpoints itself.
    """
    if any(is_checkpoint_name(entry.name) for entry in path.iterdir()):
        raise InputError(f"{path} holds the checkpoints of a run: give the run folder above it, or one checkpoint")


def _check_sizes(folder: Path) -> Verdict:
    try:
        return Verdict(folder, read_manifest(folder), ())
    except InputError as error:
        if isinstance(error, NoCheckpoint) and not is_checkpoint_name(folder.name):
            raise
        return Verdict(folder, None, (str(error),))


def _check_bytes(folder: Path) -> Verdict:
    verdict = _check_sizes(folder)
    if verdict.manifest is None:
        return verdict
    # Do not check the format of altered files: the alteration explains any error in it.
    problems = [*hash_problems(folder, verdict.manifest.files)] or [*_format_problems(folder, verdict.manifest)]
    return Verdict(folder, verdict.manifest, tuple(problems))


def _format_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the tensor files that are invalid or incomplete; a forged manifest may list them with correct hashes."""
    try:
        names_of = _names_by_file(folder, manifest)
    except InputError as error:
        yield str(error)
        return
    for name in sorted(name for name in manifest.files if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, framework="np") as file:  # numpy: verify imports no torch
                prefix, kind, _ = name.split(".")
                lacking = names_of[int(prefix.split("_")[1]), kind] - set(file.keys())
                types = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  it is not a dict
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            yield f"checkpoint file {folder / name} is not a safetensors file ({error})"
            continue
        if lacking:
            yield f"checkpoint file {folder / name} lacks {min(lacking)}"
        if types - {"F32"}:
            yield f"checkpoint file {folder / name} has tensors of {min(types - {'F32'})}, not F32"


def _names_by_file(folder: Path, manifest: Manifest) -> defaultdict[tuple[int, str], set[str]]:
    """Return the tensors that the files of each stage and kind of state must have.

    Raises:
        InputError: the run's configuration cannot be read, or a tensor's split rule is unknown.
    """
    row = OPTIMIZERS[load_run(str(folder / CONFIG_NAME)).train.optimizer]
    names: defaultdict[tuple[int, str], set[str]] = defaultdict(set)
    for name, entry in manifest.tensors.items():
        for kind in row.kinds_of(is_matrix=saved_shard(name, entry, folder=folder).is_matrix):
            names[entry.stage, kind].add(name)
    return names
