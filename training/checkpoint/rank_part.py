"""One rank's part of a save: its tensors and its files, written as they are gathered, or in the background."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import MachineError, TrainshortError
from parallel.axes import Groups
from parallel.collectives import wait_for_all
from parallel.engine import State
from parallel.parameter import Shard, local_shape
from training.checkpoint.disk import FileEntry
from training.checkpoint.manifest import TensorEntry, file_name
from training.checkpoint.tensors import TensorFile
from training.incarnation import Fence

CHUNK_VALUES = 2**28  # fp32 values that a rank holds before it writes them: 1 GiB

ToHost = Callable[[str, str, Tensor], Tensor]
LocalShapes = dict[str, tuple[int, ...]]  # of this rank's slices of one kind, by name
GatheredTensor = tuple[str, str, Tensor]  # kind, name, value in the machine's memory


class SaveError(MachineError):
    """A checkpoint could not be saved; the earlier ones are unchanged."""


class WeightsDiverged(SaveError):
    """A state is not worth saving: its loss is not finite."""


@contextmanager
def as_save_error(folder: Path) -> Iterator[None]:
    """Turn a disk error in the block into a SaveError that names the checkpoint."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        advice = "free space, or fix the disk"
        if isinstance(error, FileNotFoundError):  # the run folder was moved or removed
            advice = "put the folder back where it was"
        raise SaveError(f"{folder} was not saved ({error.strerror}{where}): {advice}") from None


@dataclass(frozen=True)
class WrittenPart:
    """One rank's part of a save: its tensors, its files, and the first error while writing them."""

    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    problem: TrainshortError | None


class BackgroundWriter:
    """Writes a rank's part of one save at a time in a thread, from copies in the machine's memory.

    The memory of the copies is kept for the next save. torch's own way to get memory that a GPU copies to faster
    rounds each tensor up to a power of two, so this is ordinary memory.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")

    def copy(self, kind: str, name: str, value: Tensor) -> Tensor:
        """Return a copy of a tensor, which the save after this one overwrites."""
        copy = self._copies.get((kind, name))
        if copy is None:
            copy = self._copies[kind, name] = torch.empty(value.shape, dtype=torch.float32)
        return copy.copy_(value)

    def start(self, write: Callable[[], WrittenPart]) -> "Future[WrittenPart]":
        """Begin to write a part."""
        return self._thread.submit(write)


def save_part(
    state: State, staging: Path, *, folder: Path, groups: Groups, fence: Fence, background: BackgroundWriter | None
) -> "Future[WrittenPart]":
    """Write this rank's files. A collective over the data ranks.

    It raises no error of a disk, since other ranks wait in reads: the part has the first.

    Args:
        state: This rank's weights and moments.
        staging: Folder of the files.
        folder: What it will be called, for errors.
        groups: The layout's groups.
        fence: Shows whether this start of the run is still the newest.
        background: Writes after this has returned; None to write now.
    """
    stage = groups.pipeline.rank
    tensors = {name: TensorEntry(s.shape, s.rule, stage, s.tied) for name, (_, s) in state.parameters.items()}
    # All data ranks hold the same state, so each writes its share of the kinds.
    mine = {
        kind: {
            name: local_shape(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size)
            for name, (_, shard) in state.parameters.items()
            if kind in state.kinds_of(name) and not _is_tied_copy(shard, groups=groups)
        }
        for index, kind in enumerate(state.kinds)
        if index % groups.data.size == groups.data.rank
    }
    writer = _RankWriter(staging, folder=folder, groups=groups, fence=fence)
    to_host: ToHost = _to_host if background is None else background.copy
    gathered = _gathered(state, mine, groups=groups, to_host=to_host)
    if background is not None:
        return background.start(partial(writer.write, list(gathered), mine, tensors=tensors))
    part: Future[WrittenPart] = Future()
    part.set_result(writer.write(gathered, mine, tensors=tensors))
    return part


def _to_host(kind: str, name: str, value: Tensor) -> Tensor:
    return value.cpu()


def _gathered(
    state: State, mine: Mapping[str, LocalShapes], *, groups: Groups, to_host: ToHost
) -> Iterator[list[GatheredTensor]]:
    """Yield the tensors that this rank writes, a chunk at a time, without padding."""
    for chunk in _chunks(state, groups=groups):
        wait_for_all(groups.data)  # another rank's disk may be slow to take the chunk before this one
        parts = []
        for name, kind in chunk:
            value = state.read(name, kind)  # a collective: every data rank calls it, even after its disk failed
            if name in mine.get(kind, {}):
                shard = state.parameters[name][1]
                own = _without_padding(value, shard=shard, shape=mine[kind][name])
                parts.append((kind, name, to_host(kind, name, own)))
                del own
            del value  # before the next is gathered: a word embedding takes hundreds of megabytes of a GPU
        yield parts


def _chunks(state: State, *, groups: Groups) -> Iterator[list[tuple[str, str]]]:
    """Yield the names and kinds of the tensors that are gathered before any of them is written.

    The same on all data ranks, which gather them together.
    """
    chunk, values = [], 0
    for name, (_, shard) in state.parameters.items():
        for kind in state.kinds_of(name):
            chunk.append((name, kind))
            values += prod(local_shape(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size))
            if values >= CHUNK_VALUES:
                yield chunk
                chunk, values = [], 0
    if chunk:
        yield chunk


class _RankWriter:
    """Writes one rank's files of a save. It keeps its first error and does nothing after it."""

    def __init__(self, staging: Path, *, folder: Path, groups: Groups, fence: Fence) -> None:
        self._staging, self._folder, self._groups, self._fence = staging, folder, groups, fence
        self._problem: TrainshortError | None = None
        self._files: dict[str, TensorFile] = {}

    def write(
        self,
        chunks: Iterable[list[GatheredTensor]],
        kinds: Mapping[str, LocalShapes],
        *,
        tensors: dict[str, TensorEntry],
    ) -> WrittenPart:
        """Write the files of some kinds; take every chunk, even after an error, since they may be gathered now."""
        self._unless_failed(self._fence.check)
        self._unless_failed(partial(self._open, kinds))
        for chunk in chunks:
            while chunk:  # what is written is let go before the next chunk is gathered
                self._unless_failed(partial(self._add, *chunk.pop(0)))
        files: dict[str, FileEntry] = {}
        self._unless_failed(partial(self._finish, files))
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        return WrittenPart(tensors, files, self._problem)

    def _unless_failed(self, action: Callable[[], None]) -> None:
        """Run an action unless an earlier one failed; keep its error."""
        try:
            if self._problem is None:
                with as_save_error(self._folder):
                    action()
        except TrainshortError as error:
            self._problem = error

    def _open(self, kinds: Mapping[str, LocalShapes]) -> None:
        for kind, shapes in kinds.items():
            name = file_name(stage=self._groups.pipeline.rank, tensor=self._groups.tensor.rank, kind=kind)
            self._files[kind] = TensorFile(self._staging / name, shapes=shapes)

    def _add(self, kind: str, name: str, value: Tensor) -> None:
        self._files[kind].add(name, value)

    def _finish(self, files: dict[str, FileEntry]) -> None:
        for file in self._files.values():
            files[file.path.name] = file.finish()


def _is_tied_copy(shard: Shard, *, groups: Groups) -> bool:
    # The first and last stage hold the word embedding, every stage a learned bias: only the first stage saves them.
    return shard.tied and groups.pipeline.rank > 0


def _without_padding(value: Tensor, *, shard: Shard, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor rank's slice without the rows that pad it: a view of `shape`."""
    return value if shard.dim is None else value.narrow(shard.dim, 0, shape[shard.dim])
