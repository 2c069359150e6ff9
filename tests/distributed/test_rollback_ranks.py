"""Ranks that diverge go back together: what each holds is that of the checkpoint, in every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from configs.load import load_run
from data_pipeline.loader import Loader
from parallel.start import ProcessRank
from tests.support.processes import exact
from tests.support.ranks import run_ranks
from tests.support.runs import Start, prepare_quick_run, train_runs
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.rollbacks import read_rollbacks
from training.schedule import learning_rate

STEPS, EVERY = 7, 2
DIVERGING = {
    "model": {"dropout": 0.1},
    "data": {"vocab_size": 400},
    "train": {"steps": STEPS, "rollbacks": 1},
    "checkpoint": {"every": EVERY, "keep": 100},
    "evaluate": {"every": 0},
}
LAYOUTS = {
    "z0": ["parallel.tensor=2", "parallel.pipeline=1", "parallel.zero=0"],
    "z1": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.zero=1", "train.precision=bf16"],
    "z2": ["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=2", "checkpoint.background=true"],
    "z3": ["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=3"],
}


def train_apart(process: ProcessRank, *, diverging: list[list[str]], without: list[list[str]], batch: int) -> list[int]:
    """Train runs that diverge after step 5, and runs whose stream lacks the samples; return how often a step was taken.

    A run that diverges in step 6 goes back to step 4.
    """
    taken: list[int] = []

    def rate(step: int, **more: Any) -> float:
        if step == 1:
            taken.append(0)
        taken[-1] += 1
        return 1e30 if taken[-1] == 5 else learning_rate(step, **more)

    with patch("training.trainer.learning_rate", rate):
        train_runs(process, starts=[Start(overrides) for overrides in diverging])
    read = Loader.step
    with patch.object(
        Loader, "step", lambda self, place, size: read(self, place + 2 * batch * (place >= 4 * batch), size)
    ):
        again = replace(process, rendezvous=f"{process.rendezvous}_again")
        train_runs(again, starts=[Start(overrides) for overrides in without])
    return taken


def test_ranks_that_went_back_equal_those_that_never_diverged(tmp_path: Path) -> None:
    overrides = prepare_quick_run(tmp_path, DIVERGING)

    def runs(kind: str) -> list[list[str]]:
        return [[*overrides, *layout, f"run.dir={tmp_path / kind / name}"] for name, layout in LAYOUTS.items()]

    batch = load_run("demo", overrides=overrides).train.global_batch
    arguments = {"diverging": runs("back"), "without": runs("without"), "batch": batch}
    both = run_ranks(train_apart, ranks=2, arguments=arguments)
    assert both == [[6 + STEPS - 4] * len(LAYOUTS)] * 2
    for name in LAYOUTS:
        back, without = tmp_path / "back" / name, tmp_path / "without" / name
        assert [(each.step, each.left_out) for each in read_rollbacks(back)] == [(4, 2 * batch)], name
        assert exact(back) == exact(without), name
        ends = [read_manifest(list_checkpoints(run_dir)[-1].path) for run_dir in (back, without)]
        first, second = ({f: e.sha256 for f, e in end.files.items() if f.endswith("safetensors")} for end in ends)
        assert first == second, name
        assert (ends[0].left_out_samples, ends[0].order_hash == ends[1].order_hash) == (2 * batch, False)
