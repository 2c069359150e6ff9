"""fp16 training of one rank: the loss scale of a run, over restarts and rollbacks, and what it is for."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.precisions import PRECISIONS
from configs.step_sizes import StepSize
from tests.support.diverging import STEPS, Told, lines_of, poison_steps, results_of, train
from tests.support.one_rank import OneRank, one_rank
from training import loss_scale
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.loss_scale import FIRST_SCALE, GROWTH_STEPS
from training.observers import StepResult
from training.preflight import make_ready
from training.state import TrainState

HUGE = 2.0**26
FP16 = "train.precision=fp16"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneRank]:
    with one_rank(tmp_path_factory.mktemp("half"), FP16, "model.dropout=0.1") as rank:
        yield rank


def scales_of(run_dir: Path) -> list[Any]:
    return [line.get("loss_scale") for line in lines_of(run_dir)]


def test_the_scale_follows_from_the_position_alone(rank: OneRank, tmp_path: Path) -> None:
    fp32, fp16 = (rank.config(tmp_path, f"train.precision={name}").train for name in ("fp32", "fp16"))
    assert loss_scale.loss_scale(TrainState(7, 28), train=fp32) is None
    assert loss_scale.loss_scale(TrainState(7, 28, loss_scale=8.0), train=fp32) is None, "a branch in another precision"
    assert loss_scale.loss_scale(TrainState(7, 28), train=fp16) == FIRST_SCALE
    for step, expected in ((7, 8.0), (GROWTH_STEPS, 16.0), (GROWTH_STEPS + 1, 8.0), (3 * GROWTH_STEPS, 16.0)):
        assert loss_scale.loss_scale(TrainState(step, 4 * step, loss_scale=8.0), train=fp16) == expected


def test_a_run_keeps_its_scale_over_restarts_and_rollbacks(
    half: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", HUGE)
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with caplog.at_level(logging.INFO):
        train(half, whole)
    scales = scales_of(whole)
    assert 1 < scales[0] < HUGE
    tried = [HUGE, *(scale * (1 if step % 4 else 2) for step, scale in enumerate(scales[:-1], start=1))]
    assert [message for message in caplog.messages if "loss scale" in message] == [
        f"step {step}: gradients overflowed, loss scale {scale:.0f} instead of {first:.0f}"
        for step, (scale, first) in enumerate(zip(scales, tried, strict=True), start=1)
        if scale < first
    ]
    assert all(scale <= first for scale, first in zip(scales, tried, strict=True))
    saved = [read_manifest(each.path).loss_scale for each in list_checkpoints(whole)]
    assert saved == [scales[2], scales[5], scales[8]]

    def stop(result: StepResult) -> None:
        if result.step == 3:
            (broken / "STOP").touch()

    assert train(half, broken, told=Told(stop)).step < STEPS
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0)  # which a restart must not take
    train(half, broken)
    assert (scales_of(broken), results_of(broken)) == (scales, results_of(whole))

    monkeypatch.setattr(loss_scale, "FIRST_SCALE", HUGE)
    poison_steps(half, monkeypatch, 5)  # no scale helps step 6
    back, told_back = tmp_path / "back", Told()
    end = train(half, back, told=told_back)
    assert (told_back.went_back, end.step, end.left_out_samples > 0) == ([3], STEPS, True)
    assert min(scales_of(back)) >= scales[2] / 4, "the scale went back too: it had fallen to 1"


def test_a_step_that_overflowed_equals_one_that_did_not(half: OneRank, tmp_path: Path) -> None:
    batches, taken = half.loader(half.config(tmp_path / "run")).step(0, StepSize(4, 8)), []
    for scale in (HUGE, None):
        half.trainer(half.config(tmp_path / f"run-{scale}"))  # the initial weights, without moments
        torch.manual_seed(3)
        first = taken[0][0].loss_scale if scale is None else scale
        outcome = half.engine.train_step(batches, learning_rate=1e-2, loss_scale=first)
        state = half.engine.state()
        taken.append(
            (outcome, [state.read(name, kind).clone() for name in state.parameters for kind in state.kinds_of(name)])
        )
    (retried, after), (fitting, expected) = taken
    assert retried.loss_scale == fitting.loss_scale < HUGE
    assert (float(retried.loss), float(retried.grad_norm)) == (float(fitting.loss), float(fitting.grad_norm))
    assert all(torch.equal(one, other) for one, other in zip(after, expected, strict=True))


def test_only_gradients_are_tried_with_smaller_scales(half: OneRank, tmp_path: Path) -> None:
    half.trainer(half.config(tmp_path / "run"))  # the initial weights
    batches = half.loader(half.config(tmp_path / "run")).step(0, StepSize(4, 8))
    weight = next(half.engine.module.parameters())
    hook = weight.register_hook(lambda gradient: gradient * torch.inf)
    try:
        outcome = half.engine.train_step(batches, learning_rate=1e-2, loss_scale=16.0)
    finally:
        hook.remove()
    assert (outcome.loss_scale, outcome.loss.isfinite(), outcome.grad_norm.isfinite()) == (1.0, True, False)
    weight.data.fill_(torch.inf)
    outcome = half.engine.train_step(batches, learning_rate=1e-2, loss_scale=16.0)
    assert (outcome.loss_scale, outcome.loss.isfinite(), outcome.grad_norm.isfinite()) == (16.0, False, False)


def test_small_gradients_need_the_scale(rank: OneRank, half: OneRank, tmp_path: Path) -> None:
    batches = rank.loader(rank.config(tmp_path / "run")).step(0, StepSize(4, 8))
    # Gradients of a long batch are that small: here of weights of the head, by a loss of 2^-16.
    errors = {}
    for scale in (2.0**-16, FIRST_SCALE):
        exact, rounded = (
            gradients_of(each, batches, tmp_path, scale=factor) for each, factor in ((rank, None), (half, scale))
        )
        errors[scale] = float((exact - rounded).norm() / exact.norm())
    assert errors[FIRST_SCALE] < 5e-3
    assert errors[2.0**-16] > 0.1


def gradients_of(rank: OneRank, batches: Any, tmp_path: Path, *, scale: float | None) -> torch.Tensor:
    """Return the gradients of a step that moves no weight, up to a factor, in fp64."""
    rank.trainer(rank.config(tmp_path / "run", "model.dropout=0"))  # the initial weights, without moments
    for module in rank.engine.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rank.engine.train_step(batches, learning_rate=0.0, loss_scale=scale)
    state = rank.engine.state()
    return torch.cat([state.read(name, "exp_avg").flatten().double() for name in state.parameters])


def test_precisions_of_a_gpu_are_refused_on_a_cpu(rank: OneRank, tmp_path: Path) -> None:
    config = rank.config(tmp_path / "run", "train.precision=tf32")
    with pytest.raises(InputError) as caught:
        make_ready(config, world_size=1, device="cpu")
    assert str(caught.value) == "train.precision tf32 needs a GPU, and this machine has none: use fp32"
    make_ready(config, world_size=1, device="cuda")
    assert [name for name, row in PRECISIONS.items() if row.gpu_only] == ["tf32"]
