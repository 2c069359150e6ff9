"""`train.batch_warmup`: smaller batches at the beginning of a run."""

from pathlib import Path
from typing import Any

import pytest

from configs.batches import batch_of, batches_of, samples_until
from configs.errors import InputError
from configs.load import load_run
from parallel.layout import Layout
from tests.support.diverging import lines_of, results_of, train
from tests.support.one_rank import OneRank
from tests.support.steps import step_result
from training.pace import Pace
from training.progress_lines import tokens_between

WARM_UP = "train.batch_warmup=[[2, 3]]"  # train.global_batch is 4
STEPS = 6


def test_the_batch_of_each_step(rank: OneRank, tmp_path: Path) -> None:
    run = rank.config(tmp_path, "train.batch_warmup=[[1, 2], [3, 1]]", "train.micro_batch=1")
    assert [batch_of(step, run.train) for step in range(1, 7)] == [1, 1, 3, 4, 4, 4]
    assert [samples_until(step, run.train) for step in range(6)] == [0, 1, 2, 5, 9, 13]
    assert batches_of(run.train) == (1, 3, 4)
    assert tokens_between(2, 4, run) == 7 * run.data.sequence_length
    always = rank.config(tmp_path)
    assert [samples_until(step, always.train) for step in (0, 3)] == [0, 12]


def test_a_warm_up_equals_a_run_and_its_branch(rank: OneRank, tmp_path: Path) -> None:
    whole, small, rest = (tmp_path / name for name in ("whole", "small", "rest"))
    end = train(rank, whole, WARM_UP, steps=STEPS)
    lines = lines_of(whole)
    assert [line["consumed_samples"] for line in lines] == [2, 4, 6, 10, 14, 18]
    assert [line["tokens_seen"] for line in lines] == [8 * line["consumed_samples"] for line in lines]
    assert [round(line["tokens_per_second"] * line["step_seconds"]) for line in lines] == [16] * 3 + [32] * 3
    assert end.consumed_samples == 18
    # the same by other means: a run of the small batch, and one that branches off with the large one
    train(rank, small, "train.global_batch=2", f"train.decay_steps={STEPS}", steps=3)
    train(rank, rest, f"train.branch_from={small}", f"train.decay_steps={STEPS}", steps=STEPS)
    steps, tensors = results_of(whole)
    assert (results_of(small)[0] + results_of(rest)[0], results_of(rest)[1]) == (steps, tensors)
    # and from any checkpoint
    again = tmp_path / "again"
    for last in (1, 4):
        train(rank, again, WARM_UP, f"train.decay_steps={STEPS}", "checkpoint.every=1", steps=last)
    train(rank, again, WARM_UP, steps=STEPS)
    assert results_of(again) == (steps, tensors)


def test_time_left_counts_sequences_not_steps(rank: OneRank, tmp_path: Path) -> None:
    run = rank.config(tmp_path, WARM_UP, "train.steps=6")
    pace = Pace(run, step=0)
    for step in (1, 2, 3):
        pace.on_step(step_result(step=step, step_seconds=1.0), now=float(step))
    assert pace.sample_seconds == pytest.approx(0.5)
    assert pace.seconds_left == pytest.approx(3 * 4 * 0.5)
    assert pace.step_seconds == pytest.approx(4 * 0.5), "the next one is larger"
    assert (pace.steps_taken, pace.samples_taken) == (3, 6)


@pytest.mark.parametrize(
    ("warm_up", "message"),
    [
        ("[[8, 1], [4, 1]]", "train.batch_warmup must have growing batches below train.global_batch (16), got 8, 4"),
        ("[[16, 1]]", "train.batch_warmup must have growing batches below train.global_batch (16), got 16"),
        ("[[6, 1], [8, 1]]", "train.micro_batch must divide the batches of train.batch_warmup, got 4 and 6: use 1, 2,"),
        ("[[8, 0]]", "train.batch_warmup.0.1: must be greater than or equal to 1, got 0"),
        ("[[8]]", "train.batch_warmup.0.1 is missing: add it"),
        ("[[8, 1, 2]]", "train.batch_warmup.0 must have 2 entries, got (8, 1, 2): remove the others"),
        ("8", "train.batch_warmup must be a list, got 8: write [8]"),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(warm_up: str, message: str) -> None:
    sizes = ["train.micro_batch=4", "train.global_batch=16"]
    with pytest.raises(InputError) as caught:
        load_run("demo", overrides=[*sizes, f"train.batch_warmup={warm_up}"])
    assert message in str(caught.value)


def test_ranks_that_a_batch_does_not_divide_over_are_refused() -> None:
    keys: list[Any] = ["train.micro_batch=2", "train.global_batch=16", "train.batch_warmup=[[4, 9]]"]
    run = load_run("demo", overrides=[*keys, "parallel.tensor=1", "parallel.pipeline=1"])
    assert Layout.of(run, world_size=2).micro_batches == 4
    with pytest.raises(InputError) as caught:
        Layout.of(run, world_size=4)
    assert str(caught.value) == (
        "each batch of train.batch_warmup must be a multiple of train.micro_batch x data ranks (2 x 4 = 8), got 4: "
        "change one of them"
    )
