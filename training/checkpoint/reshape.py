"""`trainshort checkpoint reshape --dry-run`: how each tensor of a checkpoint would be cut in another layout."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from configs.load import load_run
from parallel.layout import Layout
from parallel.parameter import Shard, padded_rows, span
from training.checkpoint.manifest import CONFIG, find_checkpoint
from training.checkpoint.read import rule_of

STATE_BYTES = 3 * 4  # of one parameter: fp32 weight and two moments


@dataclass(frozen=True)
class Cut:
    """One tensor before and after.

    Attributes:
        name: Logical name.
        rule: How tensor ranks split it.
        tied: Whether several pipeline stages hold it.
        shape: Whole shape.
        saved: Rows, or columns, that each tensor rank saved; empty where it is not split.
        wanted: Those that each would hold.
        padding: Rows of zeros that make the last one's equal to the others'; neither saved nor read.
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
        tensor, pipeline: What saved it.
        layout: What would resume it.
        cuts: Each tensor.
        state_bytes: Weights and moments, as they lie on the disk and are read: each byte once a data rank.
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
    """Return how each tensor of a checkpoint would be cut.

    Args:
        path: A checkpoint, or a run folder for its newest.
        overrides: Of the run, `parallel.tensor=4`.
        ranks: Ranks in all; tensor x pipeline unless given.
    Raises:
        InputError: no checkpoint, no legal layout, or a tensor without a rule.
    """
    folder, manifest = find_checkpoint(path)
    config = load_run(str(folder / CONFIG), overrides=overrides)
    layout = Layout.of(config, world_size=ranks or config.parallel.tensor * config.parallel.pipeline)
    cuts = []
    for name, entry in manifest.tensors.items():
        shard = Shard(name, entry.shape, rule_of(entry.rule, path=folder))
        cuts.append(
            Cut(
                name=name,
                rule=shard.rule,
                tied=entry.tied,
                shape=shard.shape,
                saved=_parts(shard, manifest.tensor),
                wanted=_parts(shard, layout.tensor),
                padding=padded_rows(shard, tensor_size=layout.tensor),
            )
        )
    total = STATE_BYTES * sum(prod(cut.shape) for cut in cuts)
    return Reshape(folder, manifest.tensor, manifest.pipeline, layout, tuple(cuts), total)


def _parts(shard: Shard, tensor_size: int) -> tuple[int, ...]:
    if shard.dim is None:
        return ()
    spans = (span(shard, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size))
    return tuple(stop - start for start, stop in spans)
