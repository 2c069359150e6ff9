"""Muon steps whole matrices as torch's does, and as a formula in fp64; the rest is AdamW's."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.paths import MANIFEST_NAME
from parallel.muon import Muon, Work, orthogonal
from parallel.parameter import Shard
from tests.support.one_rank import one_rank
from training.check_notes import check_notes
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import list_checkpoints, read_manifest, write_manifest
from training.checkpoint.read import open_checkpoint
from training.checkpoint.verify import verify_checkpoints

SHAPES = {"tall": (96, 32), "wide": (32, 96), "square": (48, 48)}
LEARNING_RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.95


def matrix(name: str, shape: tuple[int, ...], *, heads: int | None = None) -> Shard:
    return Shard(f"blocks.0.{name}.weight", shape, "column", decays=True, heads=heads)


def muon_of(weights: Sequence[nn.Parameter], shards: Sequence[Shard], *more: nn.Parameter) -> Muon:
    """Return Muon over whole matrices, and AdamW over further parameters, with its state."""
    groups = [
        {"params": list(weights), "weight_decay": DECAY, "of_matrices": True},
        {"params": list(more), "weight_decay": DECAY, "of_matrices": False},
    ]
    optimizer = Muon(groups[: 1 + bool(more)], momentum=MOMENTUM, dtype=torch.float32, lr=LEARNING_RATE, fused=True)
    for weight in weights:
        optimizer.state[weight]["exp_avg"] = torch.zeros_like(weight)

    def whole(_: Sequence[Tensor], values: Sequence[Tensor], work: Work) -> None:
        for value, shard in zip(values, shards, strict=True):
            value.copy_(work(shard, value))

    optimizer.on_whole_matrices = whole
    return optimizer


def drawn(*shapes: tuple[int, ...], seed: int = 1) -> list[nn.Parameter]:
    """Return weights with gradients."""
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return weights


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Let torch's Muon multiply in fp32 instead of bf16."""
    with patch.object(torch.Tensor, "bfloat16", lambda self: self.clone()):
        yield


@pytest.mark.usefixtures("exact_products")
def test_steps_are_those_of_torchs_muon_and_adamw() -> None:
    *weights, vector = drawn(*SHAPES.values(), (7,))
    *others, other_vector = drawn(*SHAPES.values(), (7,))
    mine = muon_of(weights, [matrix(name, shape) for name, shape in SHAPES.items()], vector)
    told = {"lr": LEARNING_RATE, "weight_decay": DECAY}
    muon = torch.optim.Muon(others, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw", **told)
    adamw = torch.optim.AdamW([other_vector], fused=True, **told)
    first = [weight.detach().clone() for weight in weights]
    for step in range(4):
        for ours, theirs in ((weights, others), ([vector], [other_vector])):
            for weight, other in zip(ours, theirs, strict=True):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
                other.grad = weight.grad.clone()
        for optimizer in (mine, muon, adamw):
            optimizer.step()
    for weight, other, before in zip(weights, others, first, strict=True):
        assert (weight - before).abs().max() > 1e-3
        torch.testing.assert_close(weight, other, atol=2e-6, rtol=0)
    assert torch.equal(vector, other_vector)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_go_through_the_polynomial(shape: tuple[int, int]) -> None:
    matrices = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    made = orthogonal(matrices, dtype=torch.float64)
    torch.testing.assert_close(made, u * s[:, None] @ v, atol=1e-10, rtol=0)
    assert (s > 0.65).all(), "all but tiny singular values become about 1"
    assert (s < 1.25).all()
    # the rounding of 16 bits moves them little
    torch.testing.assert_close(orthogonal(matrices, dtype=torch.bfloat16), made, atol=0.03, rtol=0)


def test_query_key_and_value_are_matrices_of_their_own() -> None:
    heads, width, hidden = 4, 8, 32
    (fused,) = drawn((3 * heads * width, hidden))
    assert fused.grad is not None
    parts = fused.grad.clone().view(heads, 3, width, hidden).unbind(1)
    before = fused.detach().clone()
    muon_of([fused], [matrix("query_key_value", tuple(fused.shape), heads=heads)]).step()
    moved = ((1 - LEARNING_RATE * DECAY) * before - fused).view(heads, 3, width, hidden).unbind(1)
    for gradient, step in zip(parts, moved, strict=True):
        expected = orthogonal(gradient.reshape(1, heads * width, hidden), dtype=torch.float32)[0]
        step_rms = LEARNING_RATE * 0.2 * hidden**0.5 * expected
        torch.testing.assert_close(step.reshape(heads * width, hidden), step_rms, atol=1e-6, rtol=0)


def test_updates_have_adamws_size() -> None:
    weights = drawn(*SHAPES.values())
    before = [weight.detach().clone() for weight in weights]
    muon_of(weights, [matrix(name, shape) for name, shape in SHAPES.items()]).step()
    for weight, first in zip(weights, before, strict=True):
        step = ((1 - LEARNING_RATE * DECAY) * first - weight).square().mean().sqrt()
        assert 0.14 < step / LEARNING_RATE < 0.24  # 0.2, times singular values between 0.7 and 1.2


def test_a_step_without_finite_gradients_changes_nothing() -> None:
    (weight,), (other,) = drawn((32, 32)), drawn((32, 32))
    optimizers = [muon_of([each], [matrix("output", (32, 32))]) for each in (weight, other)]
    assert weight.grad is not None
    weight.grad *= 4
    for optimizer, scale in zip(optimizers, (4.0, 1.0), strict=True):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
    assert torch.equal(weight, other)
    (optimizer, _), average = optimizers, optimizers[0].state[weight]["exp_avg"]
    torch.testing.assert_close(average, optimizers[1].state[other]["exp_avg"], atol=0, rtol=0)
    kept, kept_average = weight.detach().clone(), average.clone()
    for bad in (torch.nan, torch.inf):
        weight.grad = torch.ones_like(weight)
        weight.grad[3, 3] = bad
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(weight, kept)
        assert torch.equal(average, kept_average)


def test_a_run_keeps_one_moment_of_a_matrix_and_resumes(tmp_path: Path) -> None:
    with one_rank(tmp_path, "train.optimizer=muon") as rank:
        rank.start(tmp_path / "unbroken", steps=4)
        rank.start(tmp_path / "run", steps=2)
        rank.start(tmp_path / "run", steps=4)
    folder = list_checkpoints(tmp_path / "run")[-1].path
    expected, opened = open_checkpoint(tmp_path / "unbroken"), open_checkpoint(tmp_path / "run")
    kinds: dict[str, set[str]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it has no __iter__
                kind = file.name.split(".")[1]
                kinds.setdefault(name, set()).add(kind)
                assert torch.equal(opened.tensor(name, kind=kind), expected.tensor(name, kind=kind)), (name, kind)
    assert kinds["blocks.0.feed_forward.up.weight"] == {"weight", "exp_avg"}
    for name in ("embedding.word.weight", "blocks.0.attention.output.bias", "final_norm.weight"):
        assert kinds[name] == {"weight", "exp_avg", "exp_avg_sq"}
    assert not any(verdict.problems for verdict in verify_checkpoints(tmp_path / "run"))
    for kind, name in (("exp_avg", "blocks.0.feed_forward.up.weight"), ("exp_avg_sq", "final_norm.weight")):
        remove_tensor(folder, name, kind=kind)
        (verdict,) = verify_checkpoints(folder)
        assert any(problem.endswith(f".{kind}.safetensors lacks {name}") for problem in verdict.problems)


def test_deepspeed_does_not_warn_of_muon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`watch` would show it among the warnings of each run."""
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.addHandler(caplog.handler)
    try:
        with one_rank(tmp_path, "train.optimizer=muon", "train.precision=fp16"):
            pass
    finally:
        deepspeed.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == deepspeed.name] == []


def remove_tensor(folder: Path, name: str, *, kind: str) -> None:
    """Leave a tensor out of a checkpoint's file, and let the manifest have the hash of what is left."""
    (path,) = folder.glob(f"*.{kind}.safetensors")
    manifest, tensors = read_manifest(folder), load_file(path)
    del tensors[name]
    save_file(tensors, path)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, replace(manifest, files={**manifest.files, path.name: describe_file(path)}))


def test_check_notes_a_momentum_that_adamw_ignores(tmp_path: Path) -> None:
    with one_rank(tmp_path) as rank:

        def notes(*keys: str) -> list[str]:
            return check_notes(rank.config(tmp_path / "run", *keys), device="cpu", environ={})

        assert notes("train.momentum=0.9") == [
            "train.momentum is 0.9, but train.optimizer adamw does not use it: remove it, or set train.optimizer to "
            "muon"
        ]
        assert notes("train.momentum=0.95") == notes("train.momentum=0.9", "train.optimizer=muon") == []
