"""A run saved in one layout resumes in another; TP, PP, DP and ZeRO go up and down: `make test-faults`, minutes."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, save, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again
from training.checkpoint.read import load_slices, open_on_all_ranks

BEFORE, AFTER = range(3), range(3, 13)
Steps = list[tuple[float, float]]


@dataclass(frozen=True)
class Change:
    """A run in one layout. `source` names the run that it resumes from; None starts a new run, which is saved."""

    layout: str
    ranks: int
    source: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layout}w{self.ranks}"

    def adds_as(self, source: str) -> bool:
        """Return whether forward passes add numbers in another run's order: only ZeRO and offload may differ."""
        return (self.name[:4], self.ranks) == (source[:4], int(source.partition("w")[2]))

    @property
    def keys(self) -> dict[str, object]:
        tensor, pipeline, zero = (int(self.layout[index]) for index in (1, 3, 5))
        offload = "cpu" if self.layout.endswith("-offload") else "none"
        return {"tensor": tensor, "pipeline": pipeline, "zero": zero, "offload": offload}


def of(ranks: int, *changes: str) -> list[Change]:
    """Return changes on a number of ranks, written as `layout` for a new run and `source > layout` for a resume."""
    parts = [[part.strip() for part in change.split(">")] for change in changes]
    return [Change(part[-1], ranks, part[0] if len(part) == 2 else None) for part in parts]


# Sources are runs of an earlier spawn, or earlier runs of the same one.
SPAWNS = [
    of(1, "t1p1z0"),
    of(4, "t2p2z1", "t4p1z0", "t2p1z3", "t2p1z2", "t1p2z1"),
    of(
        2,
        "t2p1z1",
        "t1p1z2",
        "t1p1z3",
        "t4p1z0w4 > t2p1z1",  # TP down, ZeRO up
        "t2p1z3w4 > t1p1z2",  # TP down, ZeRO 3 to 2
        "t1p2z1w4 > t1p2z1",  # DP down
        "t2p1z1w2 > t1p2z1",  # TP down, PP up
        "t1p1z2w2 > t1p1z3",  # ZeRO 2 to 3
        "t1p1z3w2 > t1p1z1",  # ZeRO 3 to 1
        "t1p1z0w1 > t1p1z3",  # DP up, ZeRO 0 to 3
        "t1p1z3w2 > t1p1z2-offload",  # ZeRO 3 to 2, optimizer state to the CPU
        "t1p1z2w2 > t1p1z3-offload",
        "t2p1z1w2 > t1p2z1-offload",
    ),
    of(
        1, "t2p2z1w4 > t1p1z1-offload", "t1p1z3w2 > t1p1z1", "t1p1z3w2 > t1p1z0"
    ),  # TP and PP down; DP down, ZeRO 3 to 1 and 0
    of(
        4,
        "t2p1z1w2 > t2p2z1",  # PP up
        "t2p2z1w4 > t4p1z1",  # TP up, PP down
        "t1p2z1w4 > t2p1z3",  # PP down, TP up, ZeRO 1 to 3
        "t2p1z3w4 > t2p1z2",  # ZeRO 3 to 2 with TP
        "t2p1z2w4 > t2p1z3",  # ZeRO 2 to 3 with TP
        "t2p1z3w4 > t2p2z1",  # DP down, PP up, ZeRO 3 to 1
        "t1p1z2w2 > t1p1z1",  # DP up, ZeRO 2 to 1
    ),
]


def run_changes(process: ProcessRank, *, changes: list[Change], folder: Path) -> list[Steps]:
    """Return the (loss, gradient norm) of each step of each run on these ranks."""
    runs = []
    for number, change in enumerate(changes):
        start_again(process, number=number)
        config = config_of(change.keys, run_dir=folder / change.name)
        engine, groups, layout = build(config, world_size=process.world_size)
        state = engine.state()
        if change.source is not None:
            checkpoint = open_on_all_ranks(folder / change.source, kinds=state.kinds, world=groups.world)
            load_slices(state, checkpoint, kinds=state.kinds, groups=groups)
            state.set_step(checkpoint.step)
        steps = []
        for step in (*BEFORE, *AFTER) if change.source is None else AFTER:
            if step == BEFORE.stop and change.source is None:
                save(engine, config, groups=groups, tokenizer=folder / "tokenizer.model", step=step)
            figures = take_step(engine, tokens_of(step), groups=groups, layout=layout, learning_rate=3e-3)
            steps.append((figures.loss, figures.grad_norm))
        runs.append(steps)
    return runs


@pytest.mark.faults
def test_a_change_of_layout_leaves_the_next_ten_losses_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no test here reads it")
    unbroken: dict[str, Steps] = {}
    changed = exact = 0
    for changes in SPAWNS:
        by_rank = run_ranks(run_changes, ranks=changes[0].ranks, arguments={"changes": changes, "folder": tmp_path})
        for index, change in enumerate(changes):
            steps = by_rank[0][index]
            assert all(rank[index] == steps for rank in by_rank), change
            if change.source is None:
                unbroken[change.name] = steps
            expected = unbroken["t1p1z0w1"][-len(steps) :]
            for (loss, norm), (expected_loss, expected_norm) in zip(steps, expected, strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-5), change
                assert norm == pytest.approx(expected_norm, rel=1e-5), change
            changed += change.source is not None
            if change.source and change.adds_as(change.source):
                # Bit for bit, but only the first loss: norms are summed shard by shard, and clipping uses them.
                assert steps[0][0] == unbroken[change.source][AFTER.start][0], change
                exact += 1
    assert (changed, exact) == (20, 6)
