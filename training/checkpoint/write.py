"""Save a checkpoint from all ranks, into a staging folder that is renamed once it is complete.

A folder with a step's name is always whole, even if the process is killed or the power fails, because of the order
of a save: the tensors are on disk before the manifest is written, and the manifest before the folder is renamed.

No rank may leave another waiting in a collective. So each rank keeps its own disk errors until all ranks meet; then
all raise the same one. And before each collective that follows work on a disk, the ranks wait for each other without a
limit: a disk slower than the collectives' timeout delays the save, it does not end the job.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from torch import Tensor

from configs.errors import InputError, MachineError, TrainshortError
from configs.files import sync_folder
from configs.load import dump_run
from configs.paths import checkpoints_folder
from configs.schema import RunConfig
from data_pipeline.tokenizer_files import tokenizer_files
from parallel.axes import Group, Groups
from parallel.collectives import all_gather_object, broadcast_from_first, wait_for_all
from parallel.engine import State
from parallel.parameter import Shard, local_shape
from training.checkpoint import disk
from training.checkpoint.disk import FileEntry
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    SavedState,
    TensorEntry,
    file_name,
    read_manifest,
    step_folder,
    write_manifest,
)
from training.checkpoint.retention import apply_retention, remove_unfinished
from training.checkpoint.tensors import TensorFile
from training.incarnation import Fence

logger = logging.getLogger(__name__)

CHUNK_VALUES = 2**28  # fp32 values that a rank holds before it writes them: 1 GiB


class SaveError(MachineError):
    """A checkpoint could not be saved; the earlier ones are unchanged."""


@dataclass(frozen=True)
class _RankPart:
    """One rank's part of a save: its tensors, its files, and the first error while writing them."""

    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    problem: TrainshortError | None


def save_checkpoint(
    state: State,
    *,
    config: RunConfig,
    groups: Groups,
    tokenizer: Path,
    vocab_size: int,
    saved_state: SavedState,
    fence: Fence,
    broken: Collection[Path] = (),
    in_use: Collection[Path] = (),
) -> Path:
    """Save weights and optimizer state after a step. A collective over all ranks.

    Args:
        state: This rank's weights and moments.
        config: The resolved run.
        groups: The layout's groups.
        tokenizer: The tokenizer's file, copied into the checkpoint.
        vocab_size: Tokens, without padding.
        saved_state: The position of training, for the manifest.
        fence: Shows whether this start of the run is still the newest.
        broken: Checkpoints of the run whose content is known to be altered; retention must not count them.
        in_use: Checkpoints of the run that someone reads; retention must not remove them.
    Returns:
        The checkpoint folder.
    Raises:
        SaveError: a rank's disk is full or failing; raised on every rank.
        Superseded: a newer start has taken over; raised on every rank.
    """
    folder = step_folder(checkpoints_folder(Path(config.run.dir)), step=saved_state.step)
    # The leading dot hides the folder from list_checkpoints; the token keeps two starts of one run apart.
    staging = folder.with_name(f".{folder.name}.{fence.token}")
    world = groups.world
    try:
        broadcast_from_first(lambda: _prepare(staging, folder=folder, fence=fence), group=world)
        parts = all_gather_object(_write_part(state, staging, folder=folder, groups=groups, fence=fence), group=world)
        for problem in (part.problem for part in parts if part.problem is not None):
            raise problem
        manifest = _join(parts, saved_state=saved_state, groups=groups, vocab_size=vocab_size)
        complete = partial(_complete, staging, folder, manifest, config=config, tokenizer=tokenizer, fence=fence)
        broadcast_from_first(complete, group=world)
    except TrainshortError:
        _on_first_rank(partial(_discard, staging), world=world)
        raise
    # only now: until this checkpoint is on disk, an older one may be the last whole one
    retain = partial(apply_retention, config.checkpoint, fence=fence, broken=broken, in_use=in_use)
    _on_first_rank(retain, world=world)
    return folder


def _on_first_rank(action: Callable[[], None], *, world: Group) -> None:
    """Work on the disk on rank 0; the others wait, because training goes on with a collective."""
    if world.rank == 0:
        action()
    wait_for_all(world)


def _discard(staging: Path) -> None:
    with suppress(OSError):
        disk.remove(staging)


def _prepare(staging: Path, *, folder: Path, fence: Fence) -> None:
    with _as_save_error(folder):
        fence.check()
        remove_unfinished(staging.parent, fence=fence)
        disk.make_folder(staging)


def _write_part(state: State, staging: Path, *, folder: Path, groups: Groups, fence: Fence) -> _RankPart:
    """Write this rank's files; return its first error instead of raising, since other ranks wait in reads."""
    stage = groups.pipeline.rank
    tensors = {name: TensorEntry(s.shape, s.rule, stage, s.tied) for name, (_, s) in state.parameters.items()}
    shapes = {
        name: local_shape(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size)
        for name, (_, shard) in state.parameters.items()
        if not _is_tied_copy(shard, groups=groups)
    }
    writer = _RankWriter(staging, folder=folder, groups=groups)
    # All data ranks hold the same state, so each writes its share of the kinds.
    mine = [kind for index, kind in enumerate(state.kinds) if index % groups.data.size == groups.data.rank]
    writer.unless_failed(fence.check)
    writer.unless_failed(partial(writer.open, mine, shapes=shapes))
    for chunk in _chunks(state, groups=groups):
        wait_for_all(groups.data)  # another rank's disk may be slow to take the chunk before this one
        parts = []
        for name, kind in chunk:
            value = state.read(name, kind)  # a collective: every data rank calls it, even after its disk failed
            if kind in mine and name in shapes:
                shard = state.parameters[name][1]
                parts.append((kind, name, _without_padding(value, shard=shard, shape=shapes[name]).cpu()))
        for part in parts:
            writer.unless_failed(partial(writer.add, *part))
    writer.unless_failed(writer.finish)
    writer.close()
    return _RankPart(tensors, writer.entries, writer.problem)


def _chunks(state: State, *, groups: Groups) -> Iterator[list[tuple[str, str]]]:
    """Yield the names and kinds of the tensors that are gathered before any of them is written.

    The same on all data ranks, which gather them together.
    """
    chunk, values = [], 0
    for name, (_, shard) in state.parameters.items():
        for kind in state.kinds:
            chunk.append((name, kind))
            values += prod(local_shape(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size))
            if values >= CHUNK_VALUES:
                yield chunk
                chunk, values = [], 0
    if chunk:
        yield chunk


class _RankWriter:
    """One rank's files of a save. It keeps its first error and does nothing after it."""

    def __init__(self, staging: Path, *, folder: Path, groups: Groups) -> None:
        self.problem: TrainshortError | None = None
        self.entries: dict[str, FileEntry] = {}
        self._staging, self._folder, self._groups = staging, folder, groups
        self._files: dict[str, TensorFile] = {}

    def unless_failed(self, action: Callable[[], None]) -> None:
        """Run an action unless an earlier one failed; keep its error."""
        try:
            if self.problem is None:
                with _as_save_error(self._folder):
                    action()
        except TrainshortError as error:
            self.problem = error

    def open(self, kinds: Sequence[str], *, shapes: dict[str, tuple[int, ...]]) -> None:
        for kind in kinds:
            name = file_name(stage=self._groups.pipeline.rank, tensor=self._groups.tensor.rank, kind=kind)
            self._files[kind] = TensorFile(self._staging / name, shapes=shapes)

    def add(self, kind: str, name: str, value: Tensor) -> None:
        self._files[kind].add(name, value)

    def finish(self) -> None:
        for file in self._files.values():
            self.entries[file.path.name] = file.finish()

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()


@contextmanager
def _as_save_error(folder: Path) -> Iterator[None]:
    """Turn a disk error in the block into a SaveError that names the checkpoint."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise SaveError(f"{folder} was not saved ({error.strerror}{where}): free space, or fix the disk") from None


def _join(parts: Sequence[_RankPart], *, saved_state: SavedState, groups: Groups, vocab_size: int) -> Manifest:
    """Return the manifest of all ranks' parts."""
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    for part in parts:
        # World ranks are in order of stages, and the first entry wins: the first stage saved the tied tensors.
        tensors = {**part.tensors, **tensors}
        files.update(part.files)
    return Manifest(
        **vars(saved_state),
        tensor=groups.tensor.size,
        pipeline=groups.pipeline.size,
        vocab_size=vocab_size,
        tensors=tensors,
        files=files,
    )


def _complete(
    staging: Path, folder: Path, manifest: Manifest, *, config: RunConfig, tokenizer: Path, fence: Fence
) -> None:
    """Write the files that belong to no rank, and rename the folder once everything is on disk."""
    with _as_save_error(folder):
        manifest.files.update(write_companions(staging, config=config, tokenizer=tokenizer))
        # Last, after every rank has flushed its files: a manifest must never list a file that is not on disk.
        write_manifest(staging, manifest)
        sync_folder(staging)  # the files are on disk, but their names may not be
        try:
            read_manifest(staging)
        except InputError as error:  # a checkpoint that no resume would accept must not count as saved
            raise SaveError(f"{folder} was not saved, it could not be read again: {error}") from None
        fence.check()  # as late as possible: the save took a while, and a newer start may have taken over
        _rename_into_place(staging, folder)


def write_companions(folder: Path, *, config: RunConfig, tokenizer: Path) -> dict[str, FileEntry]:
    """Write what a checkpoint holds besides its tensors, the configuration and the tokenizer; return the files.

    Args:
        folder: The checkpoint's folder.
        config: The resolved run.
        tokenizer: The tokenizer's file.
    """
    contents = {CONFIG_NAME: dump_run(config).encode(), **tokenizer_files(tokenizer)}
    return {name: disk.write_file(folder / name, [content]) for name, content in contents.items()}


def _rename_into_place(staging: Path, folder: Path) -> None:
    """Rename a complete staging folder to its final name.

    After a resume from an older checkpoint, a broken one may have that name. Rename it first, since a rename cannot
    replace a folder that is not empty, and remove it last. A kill in between loses only the broken one.
    """
    # add a random part: an earlier replaced folder that could not be removed may still be there
    replaced = staging.with_name(f"{staging.name}.{secrets.token_hex(4)}.old")
    replaces = folder.exists()
    if replaces:
        logger.warning("%s exists already and was skipped as broken: it is replaced", folder)
        disk.rename(folder, replaced)
    try:
        disk.rename(staging, folder)
    except OSError:
        if replaces:
            with suppress(OSError):
                disk.rename(replaced, folder)
        raise
    sync_folder(folder.parent)  # until the parent is flushed, a power cut could undo the rename
    if replaces:
        try:
            disk.remove(replaced)
        except OSError as error:  # only a warning: the new one is saved
            logger.warning("the replaced checkpoint %s cannot be removed (%s)", replaced, error.strerror)


def _is_tied_copy(shard: Shard, *, groups: Groups) -> bool:
    # The first and last stage hold the word embedding, every stage a learned bias: only the first stage saves them.
    return shard.tied and groups.pipeline.rank > 0


def _without_padding(value: Tensor, *, shard: Shard, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor rank's slice without the rows that pad it: a view of `shape`."""
    return value if shard.dim is None else value.narrow(shard.dim, 0, shape[shard.dim])
