"""Open a checkpoint: whole tensors for one process, or each rank's slices in any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from configs.errors import InputError
from configs.load import load_run
from configs.schema import RunConfig
from parallel.engine import State
from parallel.groups import Group
from parallel.shards import Rule, Shard, pad, span
from parallel.zero import Kind
from training.checkpoint.manifest import CONFIG, TOKENIZER, Manifest, file_name, find_checkpoint


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

    def tensor(self, name: str, *, kind: str, part: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or the [start, stop) of its split dimension; only those bytes are read.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise InputError(f"checkpoint {self.path} has no tensor {name}: it is of another model")
        shard = Shard(name, entry.shape, _rule(entry.rule, path=self.path))
        if shard.dim is None:
            return self._read(name, kind=kind, stage=entry.stage, tensor=0)
        wanted = part or (0, shard.shape[shard.dim])
        pieces = []
        for rank in range(self.manifest.tensor):
            start, stop = span(shard, tensor_rank=rank, tensor_size=self.manifest.tensor)
            first, last = max(start, wanted[0]), min(stop, wanted[1])
            if first < last:
                rows = (first - start, last - start)
                pieces.append(self._read(name, kind=kind, stage=entry.stage, tensor=rank, dim=shard.dim, part=rows))
        return torch.cat(pieces, dim=shard.dim)

    def _read(
        self, name: str, *, kind: str, stage: int, tensor: int, dim: int = 0, part: tuple[int, int] | None = None
    ) -> Tensor:
        with safe_open(self.path / file_name(stage=stage, tensor=tensor, kind=kind), framework="pt") as file:
            if part is None:
                whole: Tensor = file.get_tensor(name)
                return whole
            window = slice(*part)
            piece: Tensor = file.get_slice(name)[window] if dim == 0 else file.get_slice(name)[:, window]
            return piece


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest of a run folder.

    Raises:
        InputError: there is none, or it is broken.
    """
    folder, manifest = find_checkpoint(path)
    return Checkpoint(folder, manifest, load_run(str(folder / CONFIG)))


def load_slices(state: State, checkpoint: Checkpoint, *, kinds: Sequence[Kind], tensor: Group) -> None:
    """Set this rank's slices of weights or moments; the layout need not be the one that saved.

    Raises:
        InputError: the checkpoint is of another model.
    """
    for name, (_, shard) in state.parameters.items():
        _check(checkpoint, shard)
        part = None if shard.dim is None else span(shard, tensor_rank=tensor.rank, tensor_size=tensor.size)
        for kind in kinds:
            value = checkpoint.tensor(name, kind=kind, part=part)
            state.write(name, kind, pad(value, shard=shard, tensor=tensor))


def _check(checkpoint: Checkpoint, shard: Shard) -> None:
    entry = checkpoint.manifest.tensors.get(shard.name)
    if entry is None or entry.shape != shard.shape:
        seen = "nothing" if entry is None else f"{list(entry.shape)}"
        raise InputError(
            f"checkpoint {checkpoint.path} has {seen} for {shard.name}, the model needs {list(shard.shape)}: "
            "it is of another model"
        )


def _rule(text: str, *, path: Path) -> Rule:
    if text not in ("replicated", "column", "row", "vocabulary"):
        raise InputError(
            f"checkpoint {path} has a tensor with the unknown rule {text!r}: use the version that wrote it"
        )
    return text  # type: ignore[return-value]
