"""What a page says of one run besides its charts: certificate, layout, heads, environment. Imports no torch."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.figures import counted
from configs.paths import environment_path
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from configs.secrets import hide_secrets
from parallel.layout import Layout, effective_zero, head_blocks, stage_bounds
from training.incarnation import newest_incarnation

MOST_RANKS = 64  # that a page draws one by one
_SECTIONS = ("slurm", "code", "packages")  # of environment.json
_ZERO_SHARES = {1: "optimizer state", 2: "optimizer state and gradients", 3: "optimizer state, gradients and weights"}

_Fields = dict[str, Any]


@dataclass(frozen=True)
class CertificateFacts:
    """What the newest start stated of its positions.

    Attributes:
        verdict: A sentence on whether they are right.
        is_good: Whether every rank's attention is what its position method promises.
        headings, rows: A table with a row per rank.
        left_out: Ranks that have no row.
    """

    verdict: str
    is_good: bool
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int


@dataclass(frozen=True)
class RankPart:
    """What one rank holds; its tensor rank selects its colour."""

    rank: int
    tensor_rank: int
    heads: str
    layers: str


@dataclass(frozen=True)
class ModelCopy:
    """The ranks that hold one copy of the model: a list per pipeline stage; `share` is their part by ZeRO."""

    data_rank: int
    share: str
    stages: tuple[tuple[RankPart, ...], ...]


@dataclass(frozen=True)
class LayoutFacts:
    """A layout in words, and the copies of the model; `left_out` are those that are not drawn."""

    text: str
    copies: tuple[ModelCopy, ...]
    left_out: int

    @property
    def is_wide(self) -> bool:
        """Whether it needs more room than two stages side by side."""
        return len(self.copies) > 1 or len(self.copies[0].stages) > 2


def certificate_facts(certificate: _Fields) -> CertificateFacts:
    """Return what a line of certificates.jsonl says, worst rank first if a rank is wrong."""
    ranks: list[_Fields] = certificate["ranks"]
    wrong = [rank for rank in ranks if not _is_within(rank)]
    errors = [error for rank in ranks if (error := rank.get("error")) is not None]
    title = POSITIONS[certificate["position"]].title if certificate.get("position") in POSITIONS else "positions"
    refused = certificate.get("refused")
    if refused is not None:
        verdict = f"refused: {refused}"
    elif wrong:
        verdict = f"{title} wrong on {len(wrong)} of {len(ranks)} ranks"
    else:
        allowed = PRECISIONS[ranks[0]["precision"]].row_tolerance
        verdict = (
            f"{title} verified on {counted(len(ranks), 'rank')}; largest error {max(errors):.2g}, allowed {allowed:g}"
        )
    shown = sorted(ranks, key=lambda rank: (_is_within(rank), rank["rank"]))[:MOST_RANKS]
    rows = tuple(
        (
            f"{rank['rank']}",
            f"{rank['tensor_rank']} / {rank['stage']} / {rank['data_rank']}",
            span_text(rank["heads"]),
            "not a number" if rank.get("error") is None else f"{rank['error']:.2g}",
            "right" if _is_within(rank) else "wrong",
            f"{rank['backend']}, {rank['precision']}, {rank['device']}",
        )
        for rank in shown
    )
    headings = ("rank", "tensor / stage / data", "heads", "error", "verdict", "attention")
    return CertificateFacts(verdict, refused is None and not wrong, headings, rows, len(ranks) - len(shown))


def layout_facts(certificate: _Fields, *, config: RunConfig, vocab_size: int) -> LayoutFacts | None:
    """Return which rank holds what; None if the run file has since been changed to a batch that does not fit."""
    ranks: list[_Fields] = certificate["ranks"]
    # of the start that stated this, not of a later one
    tensor, pipeline = (max(rank[axis] for rank in ranks) + 1 for axis in ("tensor_rank", "stage"))
    parallel = config.parallel.model_copy(update={"tensor": tensor, "pipeline": pipeline})
    config = config.model_copy(update={"parallel": parallel})
    try:
        layout = Layout.of(config, world_size=len(ranks))
    except InputError:
        return None
    head = head_blocks(config.model, vocab_size=vocab_size, length=config.data.sequence_length)
    bounds = stage_bounds(config.model.layers, stages=layout.pipeline, head=head)
    zero = effective_zero(config.train, layout=layout)
    drawn = min(layout.data, max(1, MOST_RANKS // (layout.tensor * layout.pipeline)))
    held = {(rank["data_rank"], rank["stage"], rank["tensor_rank"]): rank for rank in ranks}
    copies = tuple(
        ModelCopy(
            data,
            _share(zero, data_rank=data, data=layout.data),
            tuple(
                tuple(
                    RankPart(rank["rank"], tensor, span_text(rank["heads"]), _layers(bounds, stage))
                    for tensor in range(layout.tensor)
                    if (rank := held.get((data, stage, tensor))) is not None
                )
                for stage in range(layout.pipeline)
            ),
        )
        for data in range(drawn)
    )
    return LayoutFacts(f"{counted(len(ranks), 'rank')}: {layout}", copies, layout.data - drawn)


def head_rows(config: RunConfig, *, certificate: _Fields | None) -> list[tuple[str, ...]]:
    """Return a row per head: its number, slope, the distance at which a key's weight is 1 %, the ranks that hold it."""
    slopes_of = POSITIONS[config.model.position].slopes
    if slopes_of is None:
        return []
    holders: dict[int, list[int]] = {}
    for rank in certificate["ranks"] if certificate else ():
        for head in rank["heads"]:
            holders.setdefault(head, []).append(rank["rank"])
    return [
        (f"{head}", f"{slope:.4g}", f"{math.log(100) / slope:,.0f}", span_text(holders.get(head, [])) or "-")
        for head, slope in enumerate(slopes_of(config.model))
    ]


def read_environment(run_dir: Path) -> _Fields:
    """Return environment.json, without sections of another type; empty if there is no file, or if it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(environment_path(run_dir).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if key not in _SECTIONS or isinstance(value, dict)}
    return {}


def environment_rows(environment: _Fields, *, run_dir: Path) -> list[tuple[str, str]]:
    """Return names and values of what the newest start ran on; without what is not known, and without secrets.

    Args:
        environment: The contents of environment.json.
        run_dir: The run folder.
    """
    start = newest_incarnation(run_dir)
    slurm, code = environment.get("slurm") or {}, environment.get("code") or {}
    changes = ", with changes that are not committed" if code.get("diff") else ""
    rows: dict[str, Any] = {
        "device": environment.get("device"),
        "ranks": environment.get("world_size"),
        "host of rank 0": start and start.host,
        "started": start and f"{start.started_at}, start {start.number}",
        "SLURM job": slurm.get("job_id"),
        "nodes": slurm.get("nodes"),
        "platform": environment.get("platform"),
        "code": f"{code['commit'][:12]}{changes}" if isinstance(code.get("commit"), str) else None,
        "branch": code.get("branch"),
        "repository": code.get("repository"),
    }
    return _known(rows)


def version_rows(environment: _Fields) -> list[tuple[str, str]]:
    """Return names and versions of Python and of the packages that the newest start had."""
    return _known({"python": environment.get("python"), **(environment.get("packages") or {})})


def span_text(numbers: Sequence[int]) -> str:
    """Return whole numbers in a few words: 0 to 3, or 0, 2, 5."""
    if len(numbers) > 2 and [*numbers] == [*range(numbers[0], numbers[-1] + 1)]:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _known(values: _Fields) -> list[tuple[str, str]]:
    return [(name, hide_secrets(str(value))) for name, value in values.items() if value is not None]


def _is_within(rank: _Fields) -> bool:
    precision = PRECISIONS.get(rank["precision"])
    error = rank.get("error")
    return error is not None and precision is not None and error <= precision.row_tolerance


def _share(zero: int, *, data_rank: int, data: int) -> str:
    if data == 1 or zero == 0:
        return "all of it: nothing is partitioned"
    return f"ZeRO-{zero}: part {data_rank + 1} of {data} of {_ZERO_SHARES[zero]}"


def _layers(bounds: Sequence[int], stage: int) -> str:
    first, last = bounds[stage], bounds[stage + 1] - 1
    held = [f"layer {first}" if first == last else f"layers {first} to {last}"]
    if stage == 0:
        held.insert(0, "embedding")
    if stage == len(bounds) - 2:
        held.append("head")
    return ", ".join(held)
