"""`trainshort checkpoint reshape --dry-run`: how another layout would split each tensor of a checkpoint. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.load import load_run
from parallel.layout import Layout
from parallel.parameter import Shard, padded_rows, span
from training.checkpoint.manifest import CONFIG_NAME, find_checkpoint, saved_shard


@dataclass(frozen=True)
class Cut:
    """How a checkpoint splits one tensor, and how another layout would.

    Attributes:
        name: Logical name.
        rule: How tensor ranks split it.
        tied: Whether several pipeline stages hold it.
        shape: Whole shape.
        saved: Rows, or columns, that each tensor rank saved; empty if it is not split.
        wanted: Rows, or columns, that each tensor rank would hold.
        padding: Rows of zeros that make the last rank's slice as large as the others'; neither saved nor read.
    """

    name: str
    rule: str
    tied: bool
    shape: tuple[int, ...]
    saved: tuple[int, ...]
    wanted: tuple[int, ...]
    padding: int


@dataclass(frozen=True)
class Reshape:
    """A checkpoint in another layout.

    Attributes:
        path: The checkpoint.
        tensor: Tensor ranks of the layout that saved it.
        pipeline: Stages of that layout.
        layout: The layout that would resume it.
        cuts: How each tensor is split.
        state_bytes: Its tensors on disk; every byte is read once per data rank.
    """

    path: Path
    tensor: int
    pipeline: int
    layout: Layout
    cuts: tuple[Cut, ...]
    state_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "path": str(self.path)}


def plan_reshape(path: Path, *, overrides: Sequence[str], ranks: int | None) -> Reshape:
    """Return how another layout would split each tensor of a checkpoint.

    Args:
        path: A checkpoint, or a run folder for its newest.
        overrides: Overrides of the run, such as `parallel.tensor=4`.
        ranks: World size; tensor x pipeline unless given.
    Raises:
        InputError: no checkpoint, no legal layout, an override that no resume would take, or a tensor with an unknown
            rule.
    """
    folder, manifest = find_checkpoint(path)
    config = load_run(str(folder / CONFIG_NAME), overrides=overrides)
    if overrides:
        from training.folder import refuse_changes  # here: it imports numpy

        refuse_changes(load_run(str(folder / CONFIG_NAME)), config, run_dir=folder, trained=manifest.step)
    layout = Layout.of(config, world_size=ranks or config.parallel.tensor * config.parallel.pipeline)
    shards = [saved_shard(name, entry, folder=folder) for name, entry in manifest.tensors.items()]
    cuts = tuple(
        Cut(
            name=shard.name,
            rule=shard.rule,
            tied=shard.tied,
            shape=shard.shape,
            saved=_rows_by_rank(shard, manifest.tensor),
            wanted=_rows_by_rank(shard, layout.tensor),
            padding=padded_rows(shard, tensor_size=layout.tensor),
        )
        for shard in shards
    )
    state_bytes = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(".safetensors"))
    return Reshape(folder, manifest.tensor, manifest.pipeline, layout, cuts, state_bytes)


def _rows_by_rank(shard: Shard, tensor_size: int) -> tuple[int, ...]:
    if shard.dim is None:
        return ()
    spans = (span(shard, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size))
    return tuple(stop - start for start, stop in spans)
