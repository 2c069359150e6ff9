"""Write a checkpoint of weights without optimizer state, from one process."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from configs.schema import RunConfig
from parallel.parameter import Shard
from training.checkpoint.manifest import Manifest, TensorEntry, file_name, write_manifest
from training.checkpoint.tensors import TensorFile
from training.checkpoint.write import write_companions
from training.state import TrainState


def write_weights_only(
    folder: Path,
    weights: Iterable[Tensor],
    *,
    shards: Sequence[Shard],
    state: TrainState,
    config: RunConfig,
    tokenizer: Path,
    vocab_size: int,
) -> None:
    """Write a checkpoint that any layout reads and no training resumes from.

    So its manifest has nothing for a resume to compare: the loss of the check batch is 0, the hash of the next samples
    is empty.

    Args:
        folder: An empty folder.
        weights: Each weight whole, in the order of the shards; taken and written one at a time.
        shards: The model's parameters.
        state: The position of training that the weights stand for.
        config: The resolved run.
        tokenizer: The tokenizer's file.
        vocab_size: Tokens, without padding.
    """
    path = folder / file_name(stage=0, tensor=0, kind="weight")
    file = TensorFile(path, shapes={shard.name: shard.shape for shard in shards})
    try:
        for shard, weight in zip(shards, weights, strict=True):
            file.add(shard.name, weight)
        files = {path.name: file.finish()}
    finally:
        file.close()
    files |= write_companions(folder, config=config, tokenizer=tokenizer)
    manifest = Manifest(
        **vars(state),
        probe_loss=0.0,
        order_hash="",
        validation_loss=None,
        tensor=1,
        pipeline=1,
        vocab_size=vocab_size,
        tensors={shard.name: TensorEntry(shard.shape, shard.rule, 0, shard.tied) for shard in shards},
        files=files,
    )
    write_manifest(folder, manifest)
