"""Read a checkpoint: whole tensors in one process, or each rank's slices in any layout."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import InputError
from configs.load import load_run
from configs.schema import RunConfig
from configs.step_sizes import size_of
from parallel.axes import Group, Groups
from parallel.collectives import broadcast_from_first, raise_everywhere, wait_for_all
from parallel.parameter import Shard, local_shape, span
from parallel.shards import pad
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    TensorEntry,
    candidate_folders,
    file_name,
    first_whole,
    hash_problems,
    needed_files,
    read_manifest,
    saved_shard,
)


class LoadedInto(Protocol):
    """What a checkpoint is loaded into: an engine's `State`, or a model without an optimizer.

    Attributes:
        parameters: This rank's parameters and their shards, by logical name.
    """

    parameters: dict[str, tuple[nn.Parameter, Shard]]

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Return the kinds of state that it has of a parameter."""
        ...

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set this tensor rank's slice, given in fp32."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: Manifest
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """The run folder that contains it."""
        return self.path.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest.step

    @property
    def train_length(self) -> int:
        """Tokens of a sequence of its step, to which train.length_warmup may have cut them."""
        return size_of(self.step, self.config).length

    @property
    def vocab_size(self) -> int:
        """Tokens, without padding."""
        return self.manifest.vocab_size

    @property
    def tokenizer(self) -> Path:
        """The file of its tokenizer."""
        return self.path / self.manifest.tokenizer_name

    def weights(self) -> Mapping[str, Tensor]:
        """Return every weight whole, fp32, by logical name; each is read when it is asked for."""
        return _Weights(self)

    def tensor(self, name: str, *, kind: str) -> Tensor:
        """Return one whole tensor, fp32.

        Raises:
            InputError: the checkpoint has no such tensor, or its files contradict its manifest.
        """
        return self._slice(name, kind=kind, part=None)

    def slice(self, shard: Shard, *, kind: str, part: tuple[int, int] | None) -> Tensor:
        """Return a tensor of the model, or a slice of it; read no other bytes.

        Args:
            shard: The tensor.
            kind: Kind of state: a weight or a moment.
            part: The [start, stop) of the split dimension; None for the whole tensor.
        Raises:
            InputError: the checkpoint lacks it or has another shape, or its files contradict its manifest.
        """
        self._entry_of(shard)
        return self._slice(shard.name, kind=kind, part=part)

    def require(self, kinds: Mapping[Shard, Iterable[str]]) -> None:
        """Check that a model's tensors can be loaded, from the manifest and the files' headers; read no tensor.

        Args:
            kinds: The kinds of state that will be loaded of each tensor of the model.
        Raises:
            InputError: the checkpoint lacks one or has another shape, or its files contradict its manifest.
        """
        by_file: defaultdict[tuple[int, str], list[Shard]] = defaultdict(list)
        for shard, of_shard in kinds.items():
            for kind in of_shard:
                by_file[self._entry_of(shard).stage, kind].append(shard)
        for ((stage, kind), shards), rank in product(by_file.items(), range(self.manifest.tensor)):
            with self._open_file(stage=stage, tensor_rank=rank, kind=kind) as file:
                for shard in shards:
                    self._check_header(file, self._saved_shard(shard.name), tensor_rank=rank)

    def _entry_of(self, shard: Shard) -> TensorEntry:
        """Return the manifest's entry of a model's tensor after checking its shape."""
        entry = self.manifest.tensors.get(shard.name)
        if entry is None or entry.shape != shard.shape:
            seen = "nothing" if entry is None else f"{list(entry.shape)}"
            raise InputError(
                f"checkpoint {self.path} has {seen} for {shard.name}, the model needs {list(shard.shape)}: "
                "it is of another model"
            )
        return entry

    def _saved_shard(self, name: str) -> Shard:
        """Return how a tensor was split when it was saved."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise InputError(f"checkpoint {self.path} has no tensor {name}: it is of another model")
        return saved_shard(name, entry, folder=self.path)

    def _slice(self, name: str, *, kind: str, part: tuple[int, int] | None) -> Tensor:
        shard, stage = self._saved_shard(name), self.manifest.tensors[name].stage
        if shard.dim is None:
            return self._read(shard, kind=kind, stage=stage, tensor_rank=0, rows=None)
        start, stop = part or (0, shard.shape[shard.dim])
        # A rank that holds only padding asks for no rows and gets an empty tensor.
        no_rows = (*shard.shape[: shard.dim], 0, *shard.shape[shard.dim + 1 :])
        parts = [torch.zeros(no_rows)]
        for rank in range(self.manifest.tensor):
            saved_start, saved_stop = span(shard, tensor_rank=rank, tensor_size=self.manifest.tensor)
            first, last = max(saved_start, start), min(saved_stop, stop)
            if first < last:  # the two ranges overlap
                rows = (first - saved_start, last - saved_start)
                parts.append(self._read(shard, kind=kind, stage=stage, tensor_rank=rank, rows=rows))
        return torch.cat(parts, dim=shard.dim)

    def _read(self, shard: Shard, *, kind: str, stage: int, tensor_rank: int, rows: tuple[int, int] | None) -> Tensor:
        """Read rows of the split dimension out of one tensor rank's file; all of it if `rows` is None."""
        window = slice(None) if rows is None else slice(*rows)
        with self._open_file(stage=stage, tensor_rank=tensor_rank, kind=kind) as file:
            saved = self._check_header(file, shard, tensor_rank=tensor_rank)
            value: Tensor = saved[:, window] if shard.dim == 1 else saved[window]
            return value

    def _check_header(self, file: Any, shard: Shard, *, tensor_rank: int) -> Any:
        """Return safetensors' lazy slice of a tensor after checking its type and shape against the manifest."""
        saved = file.get_slice(shard.name)
        expected = local_shape(shard, tensor_rank=tensor_rank, tensor_size=self.manifest.tensor)
        dtype, shape = saved.get_dtype(), tuple(saved.get_shape())
        if dtype != "F32" or shape != expected:
            raise InputError(
                f"checkpoint {self.path} has {shard.name} of tensor rank {tensor_rank} as {dtype} {list(shape)} where "
                f"its manifest says F32 {list(expected)}: use another checkpoint"
            )
        return saved

    @contextmanager
    def _open_file(self, *, stage: int, tensor_rank: int, kind: str) -> Iterator[Any]:
        path = self.path / file_name(stage=stage, tensor=tensor_rank, kind=kind)
        if path.name not in self.manifest.files:  # so neither its size nor its hash was checked
            raise InputError(f"checkpoint {self.path} has no file {path.name}: use another checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, IndexError) as error:
            raise InputError(f"checkpoint file {path} cannot be read ({error}): use another checkpoint") from None


class _Weights(Mapping[str, Tensor]):
    """The weights of a checkpoint, so that a model need not be in memory whole."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name, kind="weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.manifest.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.manifest.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest whole checkpoint of a run folder, to read its weights.

    Check every byte of the weights.

    Raises:
        InputError: there is no checkpoint, or none is whole.
    """

    def check(folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        for problem in hash_problems(folder, needed_files(manifest, kinds=("weight",))):
            raise InputError(f"{problem}: use another checkpoint")
        return manifest

    return _with_config(*first_whole(candidate_folders(path), check=check))


def open_on_all_ranks(path: Path, *, kinds: Sequence[str], world: Group) -> Checkpoint:
    """Open one checkpoint on every rank: a folder, or the newest whole checkpoint of a run folder. A collective.

    Args:
        path: A checkpoint or a run folder.
        kinds: Kinds of state that will be loaded.
        world: All ranks.
    Raises:
        InputError: there is no checkpoint, or none is whole; raised on every rank.
    """
    # Only rank 0 lists the folders: on a shared file system other nodes may still see an older list.
    folders = broadcast_from_first(lambda: candidate_folders(path), group=world)
    return open_first_whole(folders, kinds=kinds, world=world)


def open_first_whole(folders: Sequence[Path], *, kinds: Sequence[str], world: Group) -> Checkpoint:
    """Open the first whole checkpoint of several on every rank; warn about those before it. A collective.

    One of the ranks checks each byte that loading needs.

    Args:
        folders: Checkpoints, at least one, the same on every rank.
        kinds: Kinds of state that will be loaded.
        world: All ranks.
    Raises:
        InputError: none is whole; raised on every rank.
    """

    def check(folder: Path) -> Manifest:
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            needed = sorted(needed_files(manifest, kinds=kinds).items())
            # With fewer files than ranks, this spreads them over all ranks, and so over all nodes.
            mine = dict(f for i, f in enumerate(needed) if i * world.size // len(needed) == world.rank)
            for altered in hash_problems(folder, mine):
                raise InputError(f"{altered}: use another checkpoint")
        except InputError as error:
            problem = error
        # All ranks must reject a folder together, or some would try the next one while others load this one.
        raise_everywhere(problem, group=world)
        assert manifest is not None, "without a problem there is a manifest"
        return manifest

    return _with_config(*first_whole(folders, check=check))


def _with_config(folder: Path, manifest: Manifest) -> Checkpoint:
    return Checkpoint(folder, manifest, load_run(str(folder / CONFIG_NAME)))


def load_slices(state: LoadedInto, checkpoint: Checkpoint, *, kinds: Sequence[str], groups: Groups) -> None:
    """Load this rank's slices of some kinds of state, saved in any layout. A collective.

    Raises:
        InputError: the checkpoint is of another model, or its files contradict its manifest; raised on every rank,
            before any value is set.
    """
    problem, tensor = None, groups.tensor
    wanted = {name: [kind for kind in kinds if kind in state.kinds_of(name)] for name in state.parameters}
    try:
        checkpoint.require({shard: wanted[name] for name, (_, shard) in state.parameters.items()})
    except InputError as error:
        problem = error
    raise_everywhere(problem, group=groups.world)
    for name, (_, shard) in state.parameters.items():
        part = None if shard.dim is None else span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
        for kind in wanted[name]:
            value = checkpoint.slice(shard, kind=kind, part=part)
            state.write(name, kind, pad(value, shard=shard, tensor=tensor))
    wait_for_all(groups.world)  # a disk may be slow, and the next collective must not wait for it
