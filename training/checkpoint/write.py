"""Save a checkpoint from all ranks, into a staging folder that is renamed once it is complete.

A folder with a step's name is always whole, even if the process is killed or the power fails, because of the order
of a save: the tensors are on disk before the manifest is written, and the manifest before the folder is renamed.

No rank may leave another waiting in a collective. So each rank keeps its own disk errors until all ranks meet; then
all raise the same one. And before each collective that follows work on a disk, the ranks wait for each other without a
limit: a disk slower than the collectives' timeout delays the save, it does not end the job.

A save in the background begins with a copy of every tensor, so that training may go on while a thread of each rank
writes them. Collectives stay in the thread that trains: it ends the save once all ranks have written.
"""

import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.errors import InputError, TrainshortError
from configs.files import sync_folder
from configs.load import dump_run
from configs.paths import checkpoints_folder
from configs.schema import RunConfig
from data_pipeline.tokenizer_files import tokenizer_files
from parallel.axes import Group, Groups
from parallel.collectives import all_gather_object, broadcast_from_first, wait_for_all
from parallel.engine import State
from training.checkpoint import disk
from training.checkpoint.disk import FileEntry
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    SavedState,
    TensorEntry,
    read_manifest,
    step_folder,
    write_manifest,
)
from training.checkpoint.rank_part import BackgroundWriter, SaveError, WrittenPart, as_save_error, save_part
from training.checkpoint.retention import apply_retention, remove_unfinished
from training.incarnation import Fence

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointWriter:
    """Saves the checkpoints of one start of a run.

    Attributes:
        config: The resolved run.
        groups: The layout's groups.
        tokenizer: The tokenizer's file, copied into each checkpoint.
        vocab_size: Tokens, without padding.
        fence: Shows whether this start of the run is still the newest.
    """

    config: RunConfig
    groups: Groups
    tokenizer: Path
    vocab_size: int
    fence: Fence

    def begin(self, state: State, saved: SavedState, *, background: BackgroundWriter | None = None) -> "BegunSave":
        """Begin to save weights and optimizer state after a step. A collective over all ranks.

        Args:
            state: This rank's weights and moments. They may change as soon as this returns.
            saved: The position of training, for the manifest.
            background: Writes this rank's files after this has returned; None to write them now. It must be free.
        Raises:
            SaveError: the disk of rank 0 is full or failing; raised on every rank.
            Superseded: a newer start has taken over; raised on every rank.
        """
        folder = step_folder(checkpoints_folder(Path(self.config.run.dir)), step=saved.step)
        # The leading dot hides the folder from list_checkpoints; the token keeps two starts of one run apart.
        staging = folder.with_name(f".{folder.name}.{self.fence.token}")
        with _discarded_if_not_saved(staging, world=self.groups.world):
            broadcast_from_first(lambda: _prepare(staging, folder=folder, fence=self.fence), group=self.groups.world)
        part = save_part(state, staging, folder=folder, groups=self.groups, fence=self.fence, background=background)
        return BegunSave(self, saved, folder, staging, part)


@dataclass(frozen=True)
class BegunSave:
    """A save that all ranks have begun; it is no checkpoint before `finish`.

    Attributes:
        writer: What began it.
        saved: The position of training.
        folder: What the checkpoint will be called.
        staging: The folder that is being written.
        part: This rank's part.
    """

    writer: CheckpointWriter
    saved: SavedState
    folder: Path
    staging: Path
    part: "Future[WrittenPart]"

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is written or has failed."""
        return self.part.done()

    def finish(self, *, broken: Collection[Path] = (), in_use: Collection[Path] = ()) -> Path:
        """Wait until the parts are written, and make them a checkpoint. A collective over all ranks.

        Args:
            broken: Checkpoints of the run whose content is known to be altered; retention must not count them.
            in_use: Checkpoints of the run that someone reads; retention must not remove them.
        Returns:
            The checkpoint folder.
        Raises:
            SaveError: a rank's disk is full or failing; raised on every rank.
            Superseded: a newer start has taken over; raised on every rank.
        """
        writer, world = self.writer, self.writer.groups.world
        with _discarded_if_not_saved(self.staging, world=world):
            parts = all_gather_object(self.part.result(), group=world)
            for problem in (part.problem for part in parts if part.problem is not None):
                raise problem
            broadcast_from_first(partial(self._complete, parts), group=world)
        # only now: until this checkpoint is on disk, an older one may be the last whole one
        rules, fence = writer.config.checkpoint, writer.fence
        _on_first_rank(partial(apply_retention, rules, fence=fence, broken=broken, in_use=in_use), world=world)
        return self.folder

    def _complete(self, parts: Sequence[WrittenPart]) -> None:
        """Write the files that belong to no rank, and rename the folder once everything is on disk."""
        writer, manifest = self.writer, self._manifest(parts)
        with as_save_error(self.folder):
            companions = write_companions(self.staging, config=writer.config, tokenizer=writer.tokenizer)
            manifest.files.update(companions)
            # Last, after every rank has flushed its files: a manifest must never list a file that is not on disk.
            write_manifest(self.staging, manifest)
            sync_folder(self.staging)  # the files are on disk, but their names may not be
            try:
                read_manifest(self.staging)
            except InputError as error:  # a checkpoint that no resume would accept must not count as saved
                raise SaveError(f"{self.folder} was not saved, it could not be read again: {error}") from None
            writer.fence.check()  # as late as possible: the save took a while, and a newer start may have taken over
            _rename_into_place(self.staging, self.folder)

    def _manifest(self, parts: Sequence[WrittenPart]) -> Manifest:
        tensors: dict[str, TensorEntry] = {}
        files: dict[str, FileEntry] = {}
        for part in parts:
            # World ranks are in order of stages, and the first entry wins: the first stage saved the tied tensors.
            tensors = {**part.tensors, **tensors}
            files.update(part.files)
        groups = self.writer.groups
        return Manifest(
            **vars(self.saved),
            tensor=groups.tensor.size,
            pipeline=groups.pipeline.size,
            vocab_size=self.writer.vocab_size,
            tensors=tensors,
            files=files,
        )


@contextmanager
def _discarded_if_not_saved(staging: Path, *, world: Group) -> Iterator[None]:
    """Remove what a save has written if the block fails, on every rank, with a TrainshortError."""
    try:
        yield
    except TrainshortError:
        _on_first_rank(partial(_discard, staging), world=world)
        raise


def _on_first_rank(action: Callable[[], None], *, world: Group) -> None:
    """Work on the disk on rank 0; the others wait, because training goes on with a collective."""
    if world.rank == 0:
        action()
    wait_for_all(world)


def _discard(staging: Path) -> None:
    with suppress(OSError):
        disk.remove(staging)


def _prepare(staging: Path, *, folder: Path, fence: Fence) -> None:
    with as_save_error(folder):
        fence.check()
        remove_unfinished(staging.parent, fence=fence)
        disk.make_folder(staging)


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

    After a resume from an older checkpoint, a broken one may have that name, or a file, or a link to nothing. Rename it
    first, since a rename can replace nothing but an empty folder, and remove it last. A kill in between loses only the
    broken one.
    """
    # add a random part: an earlier replaced folder that could not be removed may still be there
    replaced = staging.with_name(f"{staging.name}.{secrets.token_hex(4)}.old")
    replaces = os.path.lexists(folder)
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
