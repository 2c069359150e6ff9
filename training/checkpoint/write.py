"""Save a checkpoint from all ranks: beside first, then renamed. A folder with a manifest is whole."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from configs.load import dump_run
from configs.paths import checkpoints_folder
from configs.schema import RunConfig
from data_pipeline.atomic import sync_folder
from parallel.engine import State
from parallel.groups import Groups
from parallel.shards import Shard, span
from parallel.zero import KINDS, Kind
from training.checkpoint.manifest import (
    CONFIG,
    TOKENIZER,
    FileEntry,
    Manifest,
    TensorEntry,
    describe_file,
    file_name,
    list_checkpoints,
    step_folder,
    write_manifest,
)


def save_checkpoint(
    state: State, *, config: RunConfig, groups: Groups, tokenizer: Path, vocab_size: int, step: int, samples: int
) -> Path:
    """Save the whole state after a step; every rank of the world must call it.

    Args:
        state: This rank's weights and moments.
        config: The resolved run.
        groups: The layout's groups.
        tokenizer: The sentencepiece model, copied into the checkpoint.
        vocab_size: Tokens, without padding.
        step: Optimizer steps taken.
        samples: Position in the stream of samples.
    Returns:
        The checkpoint folder.
    """
    checkpoints = checkpoints_folder(Path(config.run.dir))
    folder = step_folder(checkpoints, step=step)
    beside = checkpoints / f".{folder.name}"
    if groups.world.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    mine: dict[str, FileEntry] = {}
    for kind in KINDS:
        mine |= _write_kind(state, kind, folder=beside, groups=groups)
    tensors = {name: TensorEntry(s.shape, s.rule, groups.pipeline.rank) for name, (_, s) in state.parameters.items()}
    everyone: list[Any] = [None] * groups.world.size
    dist.all_gather_object(everyone, (tensors, mine))
    if groups.world.rank == 0:
        merged: dict[str, TensorEntry] = {}
        files: dict[str, FileEntry] = {}
        for rank_tensors, rank_files in everyone:
            merged = {**rank_tensors, **merged}  # a tied tensor belongs to the first stage that holds it
            files.update(rank_files)
        (beside / CONFIG).write_text(dump_run(config), encoding="utf-8")
        shutil.copyfile(tokenizer, beside / TOKENIZER)
        for name in (CONFIG, TOKENIZER):
            files[name] = FileEntry(**describe_file(beside / name))
        manifest = Manifest(step, samples, groups.tensor.size, groups.pipeline.size, vocab_size, merged, files)
        write_manifest(beside, manifest)
        _publish(beside, folder)
        for old in list_checkpoints(Path(config.run.dir))[: -config.checkpoint.keep]:
            # Renamed first: a removal cut short must not leave a manifest without its files.
            shutil.rmtree(old.path.rename(old.path.with_name(f".{old.path.name}")))
    dist.barrier()
    return folder


def _write_kind(state: State, kind: Kind, *, folder: Path, groups: Groups) -> dict[str, FileEntry]:
    """Write this rank's file of one kind of state, where it is the first data rank; return its entry."""
    slices: dict[str, Tensor] = {}
    for name, (_, shard) in state.parameters.items():
        part = state.read(name, kind)  # all data ranks take part
        if groups.data.rank == 0 and not _is_tied_copy(shard, groups=groups):
            slices[name] = _without_padding(part, shard=shard, groups=groups).cpu().contiguous()
    if groups.data.rank != 0:
        return {}
    path = folder / file_name(stage=groups.pipeline.rank, tensor=groups.tensor.rank, kind=kind)
    save_file(slices, path)
    return {path.name: FileEntry(**describe_file(path))}


def _is_tied_copy(shard: Shard, *, groups: Groups) -> bool:
    # The word embedding lies on the first and the last stage; the first one's is saved.
    return shard.rule == "vocabulary" and groups.pipeline.rank > 0


def _without_padding(part: Tensor, *, shard: Shard, groups: Groups) -> Tensor:
    if shard.dim is None:
        return part
    start, stop = span(shard, tensor_rank=groups.tensor.rank, tensor_size=groups.tensor.size)
    return part.narrow(shard.dim, 0, stop - start)


def _publish(beside: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # the same step saved again, after a resume from an older one
    beside.rename(folder)
    sync_folder(folder.parent)  # the rename too must survive a power cut
