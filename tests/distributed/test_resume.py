"""A run that is interrupted after any step and started again equals the unbroken one bit for bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from parallel.start import ProcessRank
from tests.support.processes import exact, metrics
from tests.support.ranks import run_ranks
from tests.support.runs import Start, prepare_quick_run, train_runs
from tests.support.watched_steps import watching
from training.checkpoint.manifest import list_checkpoints
from training.observers import Observer
from training.state import TrainState
from training.trainer import Trainer

STEPS, BRANCHED = 5, 3
SAVED_EACH_STEP = {
    "model": {"dropout": 0.1},
    "data": {"vocab_size": 400},
    "train": {"steps": STEPS, "global_batch": 16, "batch_warmup": [[8, 2]], "length_warmup": [[8, 3]]},
    "checkpoint": {"every": 1, "keep": 100},
    "evaluate": {"every": 2, "samples": 8},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a quick run whose data is prepared."""
    return prepare_quick_run(tmp_path_factory.mktemp("data"), SAVED_EACH_STEP)


def collectives_of(process: ProcessRank, *, runs: list[list[str]]) -> list[list[list[str]]]:
    """Train each run, all but the first as GPU ranks do; return the collectives of each step, without the engine's."""
    counted = []

    def watched_run(self: Trainer, observers: Sequence[Observer]) -> TrainState:
        with watching(self.engine) as watch:
            end = run(replace(self, steps_ahead=min(len(counted), 1)), observers)
        counted.append([step.collectives for step in watch.steps])
        return end

    run = Trainer.run
    with patch.object(Trainer, "run", watched_run):
        train_runs(process, starts=[Start(overrides) for overrides in runs])
    return counted


LAYOUTS = {
    "t2p2z1": (["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1"], 4),
    "t1p1z3": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=3"], 2),
    "t2p1z0": (["parallel.tensor=2", "parallel.pipeline=1", "parallel.zero=0"], 2),
    "t1p2z1-bf16": (["parallel.tensor=1", "parallel.pipeline=2", "parallel.zero=1", "train.precision=bf16"], 2),
    "t1p1z2-fp16": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=2", "train.precision=fp16"], 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_interrupted_at_any_step_equals_the_unbroken(prepared: list[str], tmp_path: Path, name: str) -> None:
    layout, ranks = LAYOUTS[name]
    unbroken = tmp_path / "unbroken"
    broken = {step: tmp_path / f"broken_{step}" for step in range(1, STEPS)}
    starts = [Start([*prepared, *layout, f"run.dir={unbroken}"])]
    for step, run_dir in broken.items():
        starts.append(Start([*prepared, *layout, f"run.dir={run_dir}"], broken_copy_of=unbroken, after_step=step))
    branches = {}
    if name == "t1p1z3":
        branches = {tmp_path / "same": layout, tmp_path / "other": ["parallel.tensor=2", "parallel.pipeline=1"]}
        point = f"train.branch_from={unbroken}/checkpoints/step_{BRANCHED:07d}"
        starts += [Start([*prepared, *keys, point, f"run.dir={run_dir}"]) for run_dir, keys in branches.items()]
    # Last, because the ranks stay deterministic.
    repeated = [tmp_path / "repeated_1", tmp_path / "repeated_2"]
    if name == "t2p1z0":
        starts += [
            Start([*prepared, *layout, "train.deterministic=true", f"run.dir={run_dir}"]) for run_dir in repeated
        ]
    results = run_ranks(train_runs, ranks=ranks, arguments={"starts": starts})
    as_ever = STEPS + len(branches)
    assert results == [[False] * as_ever + [True] * (len(starts) - as_ever)] * ranks
    if name == "t2p1z0":
        assert exact(repeated[0]) == exact(repeated[1])

    assert [line["step"] for line in metrics(unbroken)] == list(range(1, STEPS + 1))
    for step, run_dir in broken.items():
        assert exact(run_dir) == exact(unbroken), step
        discarded = run_dir / "logs" / "metrics_discarded.jsonl"
        assert len(discarded.read_text().splitlines()) == STEPS - step + 1  # the lines after the step, and the torn one
        assert [saved.step for saved in list_checkpoints(run_dir)] == list(range(1, STEPS + 1))
    for run_dir, keys in branches.items():
        assert [saved.step for saved in list_checkpoints(run_dir)] == list(range(BRANCHED + 1, STEPS + 1))
        assert [line["step"] for line in metrics(run_dir)] == list(range(BRANCHED + 1, STEPS + 1))
        assert (exact(run_dir) == exact(unbroken)[BRANCHED:]) is (keys is layout), "dropout depends on the layout"


def test_a_step_exchanges_its_figures_in_one_collective(prepared: list[str], tmp_path: Path) -> None:
    layouts = {"t1p1z1": (1, 1), "t1p2z1": (1, 2), "t2p1z0": (2, 1)}
    runs = []
    for name, (tensor, pipeline) in layouts.items():
        layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero={name[-1]}"]
        runs.append(
            [
                *prepared,
                *layout,
                "model.dropout=0",
                "checkpoint.every=100",
                "evaluate.every=0",
                f"run.dir={tmp_path / name}",
            ]
        )
    for of_rank in run_ranks(collectives_of, ranks=2, arguments={"runs": runs}):
        for steps in of_rank:
            assert len(steps) == STEPS + 1
            assert steps[0][-1:] == ["c10d::allreduce_"], "whether one asked to stop before the first step"
            # the last step is followed by its save
            assert steps[1:STEPS] == [["c10d::_allgather_base_"]] * (STEPS - 1)
    # and its figures are those of all ranks: each layout has the same losses
    first, *others = ([line["loss"] for line in metrics(tmp_path / name)] for name in layouts)
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)
