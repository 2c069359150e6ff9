"""Which checkpoints `trainshort checkpoint average` averages, and whether they fit together. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.figures import counted
from configs.load import load_run
from configs.schema import RunConfig
from training.checkpoint.manifest import CONFIG_NAME, Manifest, candidate_folders, list_checkpoints, read_manifest
from training.same_model import model_difference

LAST = 5  # checkpoints of a run folder, unless `--last` says


@dataclass(frozen=True)
class ChosenCheckpoint:
    """One checkpoint of an average; its bytes are not checked yet."""

    path: Path
    manifest: Manifest
    config: RunConfig


def choose_checkpoints(paths: Sequence[Path], *, last: int | None) -> tuple[ChosenCheckpoint, ...]:
    """Return the checkpoints to average, the newest last, whatever the order in which they are given.

    Args:
        paths: Checkpoints, or one run folder for its newest.
        last: How many of a run folder's to take; None for LAST, or as many as there are.
    Raises:
        InputError: there are fewer than two or than `last`, one is given twice or is not whole, or they are not of one
            model, tokenizer and vocabulary.
    """
    folders = _of_run(paths[0], last=last) if len(paths) == 1 else _given(paths, last=last)
    read = [ChosenCheckpoint(path, read_manifest(path), load_run(str(path / CONFIG_NAME))) for path in folders]
    if len(read) < 2:
        raise InputError(f"{folders[0]} would be the only checkpoint of the average: give two or more")
    chosen = sorted(read, key=lambda each: (each.manifest.step, each.path.resolve()))
    for each in chosen:
        _require_same(each, chosen[-1])
    return tuple(chosen)


def _of_run(path: Path, *, last: int | None) -> list[Path]:
    """Return the newest checkpoints of a run folder, or the one checkpoint that the path is."""
    newest_first = candidate_folders(path)
    if last is None:
        return newest_first[:LAST]
    if not list_checkpoints(path):
        raise InputError(f"--last {last} is for a run folder, and {path} is a checkpoint: give the run folder")
    if len(newest_first) < last:
        raise InputError(
            f"{path} has {counted(len(newest_first), 'checkpoint')}, fewer than --last {last}: lower --last, or keep "
            "more with checkpoint.keep"
        )
    return newest_first[:last]


def _given(paths: Sequence[Path], *, last: int | None) -> list[Path]:
    """Return the checkpoints at several paths."""
    if last is not None:
        raise InputError(f"--last {last} is for one run folder, and {len(paths)} paths are given: leave --last out")
    given: dict[Path, Path] = {}  # a link may lead to one that is given too
    folders = []
    for path in paths:
        (folder, *_) = candidate_folders(path)
        if list_checkpoints(path):
            raise InputError(f"{path} is a run folder, and {len(paths)} paths are given: give one, or checkpoints")
        if (place := folder.resolve()) in given:
            raise InputError(f"{given[place]} and {path} are the same checkpoint: give each once")
        given[place] = path
        folders.append(folder)
    return folders


def _require_same(each: ChosenCheckpoint, newest: ChosenCheckpoint) -> None:
    """Refuse two checkpoints whose weights do not mean the same.

    Raises:
        InputError: names the first difference, with both values.
    """
    difference = model_difference(each.config.model, newest.config.model)
    for key, seen, wanted in (
        *([difference] if difference else []),
        ("a tokenizer of SHA-256", each.manifest.tokenizer_sha256[:12], newest.manifest.tokenizer_sha256[:12]),
        ("a vocabulary of", each.manifest.vocab_size, newest.manifest.vocab_size),
    ):
        if seen != wanted:
            raise InputError(
                f"{each.path} has {key} {seen}, {newest.path} has {wanted}: an average needs checkpoints of one model"
            )
