"""A run that is interrupted at any step and started again is bit for bit the unbroken one."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from configs.paths import data_folder
from data_pipeline.prepare import prepare_data
from tests.support.ranks import run_ranks
from tests.support.runs import Start, train_runs
from training.checkpoint.manifest import list_checkpoints

STEPS = 5
TINY = [
    "model.layers=2",
    "model.hidden=32",
    "model.heads=4",
    "model.dropout=0.1",
    "data.vocab_size=400",
    "data.sequence_length=16",
    "data.split=0.1",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.warmup_steps=2",
    "checkpoint.every=1",
    "checkpoint.keep=100",
    "evaluate.every=2",
    "evaluate.samples=8",
    f"train.steps={STEPS}",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run whose data is prepared."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} counts {i * i} of {i % 7} words, {i % 11} of them odd.\n" for i in range(6000)))
    overrides = [*TINY, f"data.sources=[{text}]", f"data.dir={folder / 'prepared'}"]
    config = load_run("demo", overrides=overrides)
    prepare_data(config.data, folder=data_folder(config), progress=False)
    return overrides


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


LAYOUTS = {
    "t2p2z1": (["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1"], 4),
    "t1p1z2": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=2"], 2),
    "t1p1z3": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=3"], 2),
    "t2p1z0": (["parallel.tensor=2", "parallel.pipeline=1", "parallel.zero=0"], 2),
    "t1p2z1-bf16": (["parallel.tensor=1", "parallel.pipeline=2", "parallel.zero=1", "train.precision=bf16"], 2),
    "t1p1z2-bf16": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero=2", "train.precision=bf16"], 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_interrupted_at_any_step_and_resumed_equals_unbroken(prepared: list[str], tmp_path: Path, name: str) -> None:
    layout, ranks = LAYOUTS[name]
    unbroken = tmp_path / "unbroken"
    broken = {step: tmp_path / f"broken_{step}" for step in range(1, STEPS)}
    starts = [Start([*prepared, *layout, f"run.dir={unbroken}"])]
    for step, run_dir in broken.items():
        starts.append(Start([*prepared, *layout, f"run.dir={run_dir}"], broken_copy_of=unbroken, after_step=step))
    run_ranks(train_runs, ranks=ranks, arguments={"starts": starts})

    expected = read_metrics(unbroken)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for step, run_dir in broken.items():
        resumed = read_metrics(run_dir)
        for key in ("step", "loss", "grad_norm", "validation_loss", "learning_rate", "tokens_seen"):
            assert [line.get(key) for line in resumed] == [line.get(key) for line in expected], (key, step)
        discarded = run_dir / "logs" / "metrics_discarded.jsonl"
        assert len(discarded.read_text().splitlines()) == STEPS - step + 1  # the lines past it, and the torn one
        assert [found.step for found in list_checkpoints(run_dir)] == list(range(1, STEPS + 1))
