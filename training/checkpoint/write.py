"""Save a checkpoint from all ranks: beside first, then renamed. A folder with a manifest is whole.

No rank may leave another waiting in a collective: each keeps its own disk's errors until all ranks meet, and then
all raise alike.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from configs.errors import InputError, MachineError, TrainshortError
from configs.load import dump_run
from configs.paths import checkpoints_folder
from configs.schema import RunConfig
from parallel.axes import Groups
from parallel.collectives import all_gather_object, broadcast_from_first
from parallel.engine import State
from parallel.parameter import Shard, span
from parallel.zero import KINDS
from training.checkpoint import disk
from training.checkpoint.disk import FileEntry
from training.checkpoint.manifest import (
    CONFIG,
    TOKENIZER,
    Manifest,
    SavedState,
    TensorEntry,
    file_name,
    read_manifest,
    step_folder,
    write_manifest,
)
from training.checkpoint.retention import apply_retention, clear_unfinished
from training.checkpoint.tensors import TensorFile
from training.incarnation import Fence

logger = logging.getLogger(__name__)


class SaveError(MachineError):
    """A checkpoint could not be saved; those before it are as they were."""


@dataclass(frozen=True)
class _Part:
    """What one rank has written: its tensors, its files, and what kept it from writing them all."""

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
    moment: SavedState,
    fence: Fence,
    broken: Collection[Path] = (),
) -> Path:
    """Save the whole state after a step; every rank of the world must call it.

    Args:
        state: This rank's weights and moments.
        config: The resolved run.
        groups: The layout's groups.
        tokenizer: The sentencepiece model, copied into the checkpoint.
        vocab_size: Tokens, without padding.
        moment: Where training is.
        fence: Tells whether this start of the run is still the newest.
        broken: Checkpoints of the run that were found altered, which retention must not count.
    Returns:
        The checkpoint folder.
    Raises:
        SaveError: a rank's disk is full or failing; raised on every rank.
        Superseded: a newer start has taken over; raised on every rank.
    """
    folder = step_folder(checkpoints_folder(Path(config.run.dir)), step=moment.step)
    # With the token, two starts of one run never share an unfinished folder.
    beside = folder.with_name(f".{folder.name}.{fence.token}")
    world = groups.world
    try:
        broadcast_from_first(lambda: _told(lambda: _prepare(beside, fence=fence), folder=folder), group=world)
        parts = all_gather_object(_write_part(state, beside, folder=folder, groups=groups, fence=fence), group=world)
        for problem in (part.problem for part in parts if part.problem is not None):
            raise problem
        manifest = _manifest(parts, moment=moment, groups=groups, vocab_size=vocab_size)
        complete = partial(_complete, beside, folder, manifest, config=config, tokenizer=tokenizer, fence=fence)
        broadcast_from_first(lambda: _told(complete, folder=folder), group=world)
    except TrainshortError:
        if world.rank == 0:
            with suppress(OSError):
                disk.remove(beside)
        raise
    if world.rank == 0:
        apply_retention(config.checkpoint, run_dir=Path(config.run.dir), fence=fence, broken=broken)
    return folder


def _prepare(beside: Path, *, fence: Fence) -> None:
    fence.check()
    clear_unfinished(beside.parent, fence=fence)
    disk.make_folder(beside)


def _write_part(state: State, beside: Path, *, folder: Path, groups: Groups, fence: Fence) -> _Part:
    """Write the files that are this rank's; its problems are returned, since the other ranks read on."""
    stage = groups.pipeline.rank
    tensors = {name: TensorEntry(s.shape, s.rule, stage, s.tied) for name, (_, s) in state.parameters.items()}
    shapes = {
        name: _local_shape(shard, groups=groups)
        for name, (_, shard) in state.parameters.items()
        if not _is_tied_copy(shard, groups=groups)
    }
    writer = _Writer(beside, folder=folder, groups=groups)
    # Data ranks hold the same: they share the kinds of state.
    mine = [kind for index, kind in enumerate(KINDS) if index % groups.data.size == groups.data.rank]
    writer.attempt(fence.check)
    writer.attempt(lambda: writer.open(mine, shapes=shapes))
    for name, (_, shard) in state.parameters.items():
        for kind in KINDS:
            part = state.read(name, kind)  # all data ranks take part, whatever became of their files
            if kind in mine and name in shapes:
                writer.attempt(lambda: writer.add(kind, name, _without_padding(part, shard=shard, groups=groups)))  # noqa: B023
    writer.attempt(writer.finish)
    writer.close()
    return _Part(tensors, writer.entries, writer.problem)


class _Writer:
    """A rank's files of one save; after its first problem it does nothing more."""

    def __init__(self, beside: Path, *, folder: Path, groups: Groups) -> None:
        self.problem: TrainshortError | None = None
        self.entries: dict[str, FileEntry] = {}
        self._beside, self._folder, self._groups = beside, folder, groups
        self._files: dict[str, TensorFile] = {}

    def attempt(self, action: Callable[[], None]) -> None:
        try:
            if self.problem is None:
                _told(action, folder=self._folder)
        except TrainshortError as error:
            self.problem = error

    def open(self, kinds: Sequence[str], *, shapes: dict[str, tuple[int, ...]]) -> None:
        for kind in kinds:
            name = file_name(stage=self._groups.pipeline.rank, tensor=self._groups.tensor.rank, kind=kind)
            self._files[kind] = TensorFile(self._beside / name, shapes=shapes)

    def add(self, kind: str, name: str, value: Tensor) -> None:
        self._files[kind].add(name, value)

    def finish(self) -> None:
        for file in self._files.values():
            self.entries[file.path.name] = file.finish()

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()


def _told(action: Callable[[], None], *, folder: Path) -> None:
    """Do what touches the disk; what the disk says against it becomes an error that a user can read."""
    try:
        action()
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise SaveError(f"{folder} was not saved ({error.strerror}{where}): free space, or mend the disk") from None


def _manifest(parts: Sequence[_Part], *, moment: SavedState, groups: Groups, vocab_size: int) -> Manifest:
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    for part in parts:
        tensors = {**part.tensors, **tensors}  # a tied tensor belongs to the first stage that holds it
        files.update(part.files)
    return Manifest(
        **vars(moment),
        tensor=groups.tensor.size,
        pipeline=groups.pipeline.size,
        vocab_size=vocab_size,
        tensors=tensors,
        files=files,
    )


def _complete(
    beside: Path, folder: Path, manifest: Manifest, *, config: RunConfig, tokenizer: Path, fence: Fence
) -> None:
    """Write what is not of one rank, the manifest last, and give the folder its name once the disk has it all."""
    manifest.files[CONFIG] = disk.write_file(beside / CONFIG, [dump_run(config).encode()])
    manifest.files[TOKENIZER] = disk.write_file(beside / TOKENIZER, [tokenizer.read_bytes()])
    write_manifest(beside, manifest)
    disk.sync_folder(beside)
    try:
        read_manifest(beside)
    except InputError as error:  # what could not be resumed from must not count as saved
        raise SaveError(f"{folder} was not saved, it could not be read again: {error}") from None
    fence.check()
    _publish(beside, folder)


def _publish(beside: Path, folder: Path) -> None:
    """Give a finished folder its name; what had it, after a resume from an older one, goes afterwards."""
    aside = beside.with_name(f"{beside.name}.{secrets.token_hex(4)}.old")  # one that could not be removed may lie there
    replaces = folder.exists()
    if replaces:
        logger.warning("%s is there already, passed over as broken: it is replaced", folder)
        disk.rename(folder, aside)
    try:
        disk.rename(beside, folder)
    except OSError:
        if replaces:
            with suppress(OSError):
                disk.rename(aside, folder)
        raise
    disk.sync_folder(folder.parent)  # the rename too must survive a power cut
    if replaces:
        try:
            disk.remove(aside)
        except OSError as error:  # the new one is saved all the same
            logger.warning("the replaced checkpoint %s cannot be removed (%s)", aside, error.strerror)


def _is_tied_copy(shard: Shard, *, groups: Groups) -> bool:
    # The word embedding lies on the first and the last stage, a learned bias on all; the first one's is saved.
    return shard.tied and groups.pipeline.rank > 0


def _local_shape(shard: Shard, *, groups: Groups) -> tuple[int, ...]:
    """Return the shape of this rank's slice, padding left out."""
    if shard.dim is None:
        return shard.shape
    start, stop = span(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size)
    return (*shard.shape[: shard.dim], stop - start, *shard.shape[shard.dim + 1 :])


def _without_padding(part: Tensor, *, shard: Shard, groups: Groups) -> Tensor:
    shape = _local_shape(shard, groups=groups)
    return part if shard.dim is None else part.narrow(shard.dim, 0, shape[shard.dim])
