"""`train.batch_warmup` and `train.length_warmup`: smaller batches and shorter sequences at the beginning of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.load import load_run
from configs.step_sizes import StepSize, batch_of, batches_of, lengths_of, samples_until, size_of
from data_pipeline.samples import open_samples
from parallel.layout import Layout
from tests.support.diverging import lines_of, poison_steps, results_of, train, train_without
from tests.support.one_rank import OneRank, one_rank
from training.api import load
from training.comparison.run import read_runs
from training.evaluation.request import EvaluationRequest
from training.evaluation.run import evaluate_checkpoint
from training.export.facts import ModelFacts
from training.export.formats.model_card import model_card
from training.export.formats.readers import TRANSFORMERS
from training.flops import causal_flops_per_token, flops_per_token
from training.pace import Pace
from training.page.curves import bias_chart
from training.progress_lines import step_lengths, step_tokens, tokens_between
from training.schedule import learning_rate
from training.state import TrainState
from training.utilization import Utilization

WARM_UP = "train.batch_warmup=[[2, 3]]"  # train.global_batch is 4
STEPS = 6
CONVENTIONS = (flops_per_token, causal_flops_per_token)


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
    constant = "train.schedule=constant"  # a fall counts sequences, which the two runs below do not know of
    end = train(rank, whole, WARM_UP, constant, steps=STEPS)
    lines = lines_of(whole)
    assert [line["consumed_samples"] for line in lines] == [2, 4, 6, 10, 14, 18]
    assert [line["tokens_seen"] for line in lines] == [8 * line["consumed_samples"] for line in lines]
    assert [round(line["tokens_per_second"] * line["step_seconds"]) for line in lines] == [16] * 3 + [32] * 3
    assert end.consumed_samples == 18
    # the same by other means: a run of the small batch, and one that branches off with the large one
    train(rank, small, "train.global_batch=2", constant, steps=3)
    train(rank, rest, f"train.branch_from={small}", constant, steps=STEPS)
    steps, tensors = results_of(whole)
    assert (results_of(small)[0] + results_of(rest)[0], results_of(rest)[1]) == (steps, tensors)
    # and from any checkpoint
    again = tmp_path / "again"
    for last in (1, 4):
        train(rank, again, WARM_UP, constant, f"train.decay_steps={last}", "checkpoint.every=1", steps=last)
    train(rank, again, WARM_UP, constant, steps=STEPS)
    assert results_of(again) == (steps, tensors)


def test_a_rollback_in_a_warm_up_leaves_out_its_batches(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("train.batch_warmup=[[2, 4]]", "train.length_warmup=[[4, 5]]")
    with monkeypatch.context() as patch:
        poison_steps(rank, patch, 5)  # step 6 has no loss
        end = train(rank, tmp_path / "run", *keys)
    # back to step 3: left out are a step of 2 and two of 4 samples
    assert end == TrainState(9, 4 * 2 + 5 * 4, left_out_samples=10)
    train_without(rank, tmp_path / "without", monkeypatch, *keys, first=6, count=10)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "without")


def test_the_length_of_each_step(rank: OneRank, tmp_path: Path) -> None:
    run = rank.config(tmp_path, "train.length_warmup=[[2, 2], [4, 1]]", WARM_UP)
    sizes = [size_of(step, run) for step in range(1, 6)]
    assert sizes == [StepSize(2, 2), StepSize(2, 2), StepSize(2, 4), StepSize(4, 8), StepSize(4, 8)]
    assert (lengths_of(run), step_lengths(run), step_tokens(run)) == ((2, 4, 8), "2 to 8", "16 to 32")
    always = rank.config(tmp_path)
    assert (size_of(1, always), step_lengths(always)) == (StepSize(4, 8), "8")
    # a run that ends in its warm-ups
    short = rank.config(
        tmp_path, "train.length_warmup=[[2, 2], [4, 2]]", "train.batch_warmup=[[2, 9]]", "train.steps=3"
    )
    assert (step_lengths(short), step_tokens(short)) == ("2 to 4", "16")


def test_the_learning_rate_falls_with_the_tokens(rank: OneRank, tmp_path: Path) -> None:
    keys = ("train.schedule=linear", "train.learning_rate=1", "train.min_learning_rate=0", "train.decay_steps=6")
    train_keys = rank.config(tmp_path, WARM_UP, *keys).train
    # 18 sequences, 2 of them in the warm-up
    expected = [1.0, *(1 - seen / 16 for seen in (2, 4, 8, 12, 16))]
    assert [learning_rate(step, train=train_keys) for step in range(1, 7)] == expected
    assert learning_rate(9, train=train_keys) == 0


def test_the_card_tells_the_largest_step_so_far(rank: OneRank, tmp_path: Path) -> None:
    config = rank.config(tmp_path, WARM_UP, "train.length_warmup=[[2, 3]]")
    for step, samples, length, said in (
        (3, 6, 2, "48 tokens: 3 steps of up to 2"),
        (4, 10, 8, "80 tokens: 4 steps of up to 4"),
    ):
        facts = ModelFacts(config, step, samples, vocab_size=400, parameters=9, train_length=length, report=None)
        card = model_card(facts, comparison="", engine=TRANSFORMERS, dtype="fp32")
        assert f"| trained on | {said} sequences |" in card
        assert f"| training length | {length} tokens |" in card
        assert f"trained at {length} tokens by" in card


def test_the_card_tells_what_a_run_began_with(rank: OneRank, tmp_path: Path) -> None:
    for keys, rows in (
        (("train.init_from=runs/a",), "2 steps of 4 sequences |\n| began with the weights of | `runs/a` |\n"),
        # its trunk took smaller steps
        (
            ("train.branch_from=/home/me/step_1", "train.global_batch=8"),
            "2 steps |\n| branched off from | `step_1` |\n",
        ),
    ):
        config = rank.config(tmp_path, *keys)
        facts = ModelFacts(config, 2, 8, vocab_size=400, parameters=9, train_length=8, report=None)
        assert f": {rows}" in model_card(facts, comparison="", engine=TRANSFORMERS, dtype="fp32")


def test_a_checkpoint_was_trained_at_the_length_of_its_step(rank: OneRank, tmp_path: Path) -> None:
    train(rank, tmp_path / "run", "train.length_warmup=[[2, 4]]", "checkpoint.every=3", steps=STEPS)
    steps = [tmp_path / "run" / "checkpoints" / f"step_000000{step}" for step in (3, 6)]
    text = tmp_path / "text.txt"
    text.write_text("the tower of the town over the river " * 9)
    for checkpoint, length in zip(steps, (2, 8), strict=True):
        report = evaluate_checkpoint(checkpoint, EvaluationRequest(lengths=(8,), data=text, scale="linear"))
        assert report["train_length"] == length
        assert report["results"][0]["scale_factor"] == 8 / length
        (run,) = read_runs([checkpoint], text=None)
        assert run.values()["train_length"] == length
        chart = bias_chart(run.config.model, trained=run.train_length)
        assert chart is not None
        assert [mark.text for mark in chart.marks] == [f"training length {length}"]
        assert load(checkpoint).train_length == length


def test_samples_are_cut_into_pieces_that_follow_each_other(rank: OneRank, tmp_path: Path) -> None:
    loader = rank.loader(rank.config(tmp_path))
    for whole, cut in zip(loader.step(4, StepSize(4, 8)), loader.step(4, StepSize(4, 2)), strict=True):
        assert (tuple(whole.shape), tuple(cut.shape)) == ((2, 9), (8, 3))
        rows = [row[begin : begin + 3] for row in whole for begin in (0, 2, 4, 6)]
        assert torch.equal(cut, torch.stack(rows))
        assert torch.equal(cut[:, 1:].reshape(2, 8), whole[:, 1:]), "each token is a target once"
    (cut, *_) = rank.loader(rank.config(tmp_path, "train.micro_batch=1")).step(0, StepSize(4, 2))
    assert cut.is_contiguous(), "else pieces of one sample share memory"


def test_documents_begin_where_they_did_in_pieces_too(tmp_path: Path) -> None:
    with one_rank(tmp_path, "data.mask_documents=true") as rank:
        config = rank.config(tmp_path / "run", "train.length_warmup=[[4, 2]]")
        samples = open_samples(rank.prepared, sequence_length=8, split=0.0, seed=1, held_out=False, documents=True)
        loader = rank.loader(config, samples=samples)
        for whole, cut in zip(loader.step(0, StepSize(4, 8)), loader.step(0, StepSize(4, 4)), strict=True):
            assert (tuple(whole.shape), tuple(cut.shape)) == ((2, 2, 9), (4, 2, 5))
            assert torch.equal(cut, torch.stack([row[:, begin : begin + 5] for row in whole for begin in (0, 4)]))


def test_short_steps_are_those_of_the_engine_on_pieces(rank: OneRank, tmp_path: Path) -> None:
    keys = ("train.length_warmup=[[2, 2], [4, 2]]", f"train.decay_steps={STEPS}")
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(rank, whole, *keys, steps=STEPS)
    for last in (1, 3, STEPS):  # from any checkpoint
        train(rank, again, *keys, "checkpoint.every=1", steps=last)
    assert results_of(again) == results_of(whole)
    # the same by hand
    config = rank.config(tmp_path / "hand", *keys, f"train.steps={STEPS}")
    trainer, taken = rank.trainer(config), []
    for step, length in enumerate((2, 2, 4, 4, 8, 8)):
        batches = rank.loader(config).step(4 * step, StepSize(4, 8))
        pieces = [
            torch.stack([row[begin : begin + length + 1] for row in batch for begin in range(0, 8, length)])
            for batch in batches
        ]
        torch.manual_seed(step)
        rate = learning_rate(step + 1, train=config.train)
        taken.append(float(trainer.engine.train_step(pieces, learning_rate=rate).loss))
    assert [line["loss"] for line in lines_of(whole)] == taken
    assert [line["consumed_samples"] for line in lines_of(whole)] == [4, 8, 12, 16, 20, 24]


def test_utilization_counts_the_length_of_the_step(rank: OneRank, tmp_path: Path) -> None:
    model = rank.config(tmp_path).model
    utilization = Utilization(model, 400, peak=1e9)
    for length in (2, 8):
        expected = [1e3 * flops(model, vocab_size=400, length=length) / 1e9 for flops in CONVENTIONS]
        assert utilization.of(1e3, length=length) == tuple(expected)
    assert Utilization(model, 400, peak=None).of(1e3, length=8) == (None, None)


def test_time_left_counts_sequences_not_steps(rank: OneRank, tmp_path: Path) -> None:
    run = rank.config(tmp_path, WARM_UP, "train.steps=6")
    pace = Pace(run, step=0)
    for step in (1, 2, 3):
        pace.on_step(step, seconds=1.0, now=float(step))
    assert pace.sample_seconds == pytest.approx(0.5)
    assert pace.seconds_left == pytest.approx(3 * 4 * 0.5)
    assert pace.step_seconds == pytest.approx(4 * 0.5), "the next one is larger"
    assert (pace.steps_taken, pace.samples_taken) == (3, 6)


def test_time_left_counts_the_length_of_later_steps(rank: OneRank, tmp_path: Path) -> None:
    run = rank.config(tmp_path, "train.length_warmup=[[2, 3]]", "train.steps=5", "evaluate.samples=6")
    short, full = (causal_flops_per_token(run.model, vocab_size=400, length=length) for length in (2, 8))
    pace = Pace(run, step=0)
    for step in (1, 2, 3):
        pace.on_step(step, seconds=1.0, now=float(step))
    assert full > 1.005 * short
    assert pace.step_seconds == pytest.approx(full / short)
    assert pace.seconds_left == pytest.approx(2 * full / short)
    assert pace.tokens_per_second == pytest.approx(4 * 8), "that of the steps that were taken"
    pace.on_step(4, seconds=5.0, now=8.0)
    assert pace.seconds_left == pytest.approx(7.0 * full / (2 * short + full)), "the first step warms up"


@pytest.mark.parametrize(
    ("warm_up", "message"),
    [
        (
            "[[32, 1], [16, 1]]",
            "growing lengths below data.sequence_length (128), got 32, 16: lower or order them",
        ),
        ("[[128, 1]]", "must have growing lengths below data.sequence_length (128), got 128: lower or order them"),
        (
            "[[48, 1]]",
            "the lengths of train.length_warmup must divide data.sequence_length (128), got 48: use 1, 2, 4,",
        ),
        (
            "[[1, 1]]",
            "with parallel.sequence, parallel.tensor (2) must divide the lengths of train.length_warmup, got 1",
        ),
    ],
)
def test_a_length_that_cannot_be_is_refused(warm_up: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_run("demo", overrides=["parallel.sequence=true", f"train.length_warmup={warm_up}"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("warm_up", "message"),
    [
        ("[[8, 1], [4, 1]]", "train.batch_warmup must have growing batches below train.global_batch (16), got 8, 4"),
        ("[[16, 1]]", "train.batch_warmup must have growing batches below train.global_batch (16), got 16"),
        ("[[6, 1], [8, 1]]", "train.micro_batch must divide the batches of train.batch_warmup, got 4 and 6: use 1, 2,"),
        ("[[8, 0]]", "train.batch_warmup.0.1: must be greater than or equal to 1, got 0"),
        ("[[8]]", "train.batch_warmup.0.1 is missing: add it"),
        ("[[8, 1, 2]]", "train.batch_warmup.0 must have 2 entries, got (8, 1, 2): remove the others"),
        ("8", "train.batch_warmup: must be a list of pairs, as [[256, 1000]], got 8"),
        ("null", "train.batch_warmup: must be a list of pairs, as [[256, 1000]], got null"),
        ("[8, 1]", "train.batch_warmup: must be a list of pairs, as [[256, 1000]], got [8, 1]"),
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
