"""Open a checkpoint: whole tensors for one process, or each rank's slices in any layout."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import InputError
from configs.load import load_run
from configs.schema import RunConfig
from parallel.axes import Group, Groups
from parallel.collectives import broadcast_from_first, raise_everywhere
from parallel.engine import State
from parallel.parameter import Rule, Shard, span
from parallel.shards import pad
from parallel.zero import Kind
from training.checkpoint.manifest import (
    CONFIG,
    TOKENIZER,
    Manifest,
    TensorEntry,
    candidates,
    file_name,
    first_whole,
    hash_problems,
    needed_files,
    read_manifest,
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: Manifest
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """The run folder it lies in."""
        return self.path.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest.step

    @property
    def vocab_size(self) -> int:
        """Tokens, without padding."""
        return self.manifest.vocab_size

    @property
    def tokenizer(self) -> Path:
        """Its sentencepiece model."""
        return self.path / TOKENIZER

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor whole, fp32, by logical name."""
        return {name: self.tensor(name, kind="weight") for name in self.manifest.tensors}

    def tensor(self, name: str, *, kind: str) -> Tensor:
        """Return one whole tensor.

        Raises:
            InputError: the checkpoint has no such tensor, or its files do not hold what the manifest says.
        """
        return self._slice(name, kind=kind, part=None)

    def slice(self, shard: Shard, *, kind: str, part: tuple[int, int] | None) -> Tensor:
        """Return a model's tensor, or the [start, stop) of its split dimension; only those bytes are read.

        Raises:
            InputError: the checkpoint has another tensor, or its files do not hold what the manifest says.
        """
        self._entry(shard)
        return self._slice(shard.name, kind=kind, part=part)

    def require(self, shards: Iterable[Shard], *, kinds: Sequence[str]) -> None:
        """Refuse what could not be loaded, by the manifest and the headers of the files; no tensor is read.

        Args:
            shards: What the model needs.
            kinds: State that will be loaded.
        Raises:
            InputError: the checkpoint has another tensor, or its files do not hold what the manifest says.
        """
        by_stage: defaultdict[int, list[Shard]] = defaultdict(list)
        for shard in shards:
            by_stage[self._entry(shard).stage].append(shard)
        for (stage, found), kind, tensor in product(by_stage.items(), kinds, range(self.manifest.tensor)):
            with self._file(stage=stage, tensor=tensor, kind=kind) as file:
                for shard in found:
                    self._found(file, self._saved(shard.name), tensor=tensor)

    def _entry(self, shard: Shard) -> TensorEntry:
        entry = self.manifest.tensors.get(shard.name)
        if entry is None or entry.shape != shard.shape:
            seen = "nothing" if entry is None else f"{list(entry.shape)}"
            raise InputError(
                f"checkpoint {self.path} has {seen} for {shard.name}, the model needs {list(shard.shape)}: "
                "it is of another model"
            )
        return entry

    def _saved(self, name: str) -> Shard:
        """Return a tensor as it was split when it was saved."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise InputError(f"checkpoint {self.path} has no tensor {name}: it is of another model")
        return Shard(name, entry.shape, rule_of(entry.rule, path=self.path))

    def _slice(self, name: str, *, kind: str, part: tuple[int, int] | None) -> Tensor:
        shard, stage = self._saved(name), self.manifest.tensors[name].stage
        if shard.dim is None:
            return self._read(shard, kind=kind, stage=stage, tensor=0, rows=None)
        wanted = part or (0, shard.shape[shard.dim])
        pieces = [torch.zeros(_cut_shape(shard, rows=(0, 0)))]
        for rank in range(self.manifest.tensor):
            start, stop = span(shard, tensor_rank=rank, tensor_size=self.manifest.tensor)
            first, last = max(start, wanted[0]), min(stop, wanted[1])
            if first < last:
                rows = (first - start, last - start)
                pieces.append(self._read(shard, kind=kind, stage=stage, tensor=rank, rows=rows))
        return torch.cat(pieces, dim=shard.dim)

    def _read(self, shard: Shard, *, kind: str, stage: int, tensor: int, rows: tuple[int, int] | None) -> Tensor:
        window = slice(None) if rows is None else slice(*rows)
        with self._file(stage=stage, tensor=tensor, kind=kind) as file:
            found = self._found(file, shard, tensor=tensor)
            value: Tensor = found[:, window] if shard.dim == 1 else found[window]
            return value

    def _found(self, file: Any, shard: Shard, *, tensor: int) -> Any:
        """Return a tensor rank's part in its file, not yet read, where its header says what the manifest does."""
        rows = None if shard.dim is None else span(shard, tensor_rank=tensor, tensor_size=self.manifest.tensor)
        found, expected = file.get_slice(shard.name), _cut_shape(shard, rows=rows)
        kind, shape = found.get_dtype(), tuple(found.get_shape())
        if kind != "F32" or shape != expected:
            raise InputError(
                f"checkpoint {self.path} has {shard.name} of tensor rank {tensor} as {kind} {list(shape)} where its "
                f"manifest says F32 {list(expected)}: use another checkpoint"
            )
        return found

    @contextmanager
    def _file(self, *, stage: int, tensor: int, kind: str) -> Iterator[Any]:
        path = self.path / file_name(stage=stage, tensor=tensor, kind=kind)
        if path.name not in self.manifest.files:
            raise InputError(f"checkpoint {self.path} has no file {path.name}: use another checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, IndexError) as error:
            raise InputError(f"checkpoint file {path} cannot be read ({error}): use another checkpoint") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest whole one of a run folder, to read weights; their bytes are checked.

    Raises:
        InputError: there is none, or none is whole.
    """

    def check(folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        for problem in hash_problems(folder, needed_files(manifest, kinds=("weight",))):
            raise InputError(f"{problem}: use another checkpoint")
        return manifest

    return _opened(*first_whole(candidates(path), check=check))


def open_together(path: Path, *, kinds: Sequence[Kind], world: Group) -> Checkpoint:
    """Open the same checkpoint on every rank: a folder, or the newest whole one of a run folder; a collective.

    Every byte that loading needs is checked, each by one rank.

    Args:
        path: A checkpoint or a run folder.
        kinds: State that will be loaded.
        world: All ranks.
    Raises:
        InputError: there is none, or none is whole; raised on every rank.
    """

    def check(folder: Path) -> Manifest:
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            needed = sorted(needed_files(manifest, kinds=kinds).items())
            # Spread over all ranks, and so over all nodes, where there are fewer files than ranks.
            mine = dict(f for i, f in enumerate(needed) if i * world.size // len(needed) == world.rank)
            for found in hash_problems(folder, mine):
                raise InputError(f"{found}: use another checkpoint")
        except InputError as error:
            problem = error
        raise_everywhere(problem, group=world)
        assert manifest is not None, "without a problem there is a manifest"
        return manifest

    # One rank looks: on a shared file system the others may still see yesterday's folder.
    folders = broadcast_from_first(lambda: candidates(path), group=world)
    return _opened(*first_whole(folders, check=check))


def _opened(folder: Path, manifest: Manifest) -> Checkpoint:
    return Checkpoint(folder, manifest, load_run(str(folder / CONFIG)))


def load_slices(state: State, checkpoint: Checkpoint, *, kinds: Sequence[Kind], groups: Groups) -> None:
    """Set this rank's slices of weights or moments; the layout need not be the one that saved. A collective.

    Raises:
        InputError: the checkpoint is of another model, or not what its manifest says; raised on every rank, before
            anything is set.
    """
    problem, tensor = None, groups.tensor
    try:
        checkpoint.require([shard for _, shard in state.parameters.values()], kinds=kinds)
    except InputError as error:
        problem = error
    raise_everywhere(problem, group=groups.world)
    for name, (_, shard) in state.parameters.items():
        part = None if shard.dim is None else span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
        for kind in kinds:
            value = checkpoint.slice(shard, kind=kind, part=part)
            state.write(name, kind, pad(value, shard=shard, tensor=tensor))


def _cut_shape(shard: Shard, *, rows: tuple[int, int] | None) -> tuple[int, ...]:
    if shard.dim is None or rows is None:
        return shard.shape
    return (*shard.shape[: shard.dim], rows[1] - rows[0], *shard.shape[shard.dim + 1 :])


def rule_of(text: str, *, path: Path) -> Rule:
    """Return a checkpoint's word for a rule as a rule.

    Raises:
        InputError: there is no such rule.
    """
    if text not in ("replicated", "column", "row", "vocabulary"):
        raise InputError(
            f"checkpoint {path} has a tensor with the unknown rule {text!r}: use the version that wrote it"
        )
    return text  # type: ignore[return-value]
