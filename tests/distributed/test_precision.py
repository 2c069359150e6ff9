"""bf16 keeps fp32 weights in memory and in checkpoints, and its losses are close to those of fp32."""

from pathlib import Path

import pytest
import torch

from tests.support.layouts import Trained, name_of, train_layouts
from tests.support.ranks import run_ranks
from training.checkpoint.read import open_checkpoint

LAYOUTS = [
    {"tensor": 2, "pipeline": 1, "zero": 1},
    {"tensor": 2, "pipeline": 2, "zero": 1},
    {"tensor": 2, "pipeline": 1, "zero": 2, "sequence": True},
    {"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True},
    {"tensor": 1, "pipeline": 2, "zero": 1},
    {"tensor": 1, "pipeline": 2, "zero": 1, "offload": "cpu"},
    {"tensor": 1, "pipeline": 1, "zero": 1},
    {"tensor": 1, "pipeline": 1, "zero": 2},
    {"tensor": 1, "pipeline": 1, "zero": 3},
    {"tensor": 1, "pipeline": 1, "zero": 3, "offload": "cpu"},
]
RANKS = 4  # without stages and tensor ranks one micro-batch each, so that only the data ranks' sum can round
NAMES = [name_of(keys, ranks=RANKS) for keys in LAYOUTS]
STEPS = range(5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def trained(runs: Path) -> dict[str, dict[str, list[Trained]]]:
    """Ranks by layout, for each precision."""
    tokenizer = runs / "tokenizer.model"
    tokenizer.write_bytes(b"no test here reads it")
    by_precision: dict[str, dict[str, list[Trained]]] = {}
    for precision in ("fp32", "bf16"):
        arguments = {
            "layouts": LAYOUTS if precision == "bf16" else LAYOUTS[:1],
            "steps": STEPS,
            "folder": runs / precision,
            "tokenizer": tokenizer,
            "start_from": None,
            "more": (f"train.precision={precision}", "train.recompute=true"),
        }
        by_rank = run_ranks(train_layouts, ranks=RANKS, arguments=arguments)
        # fp32 trains the first layout alone
        by_precision[precision] = {name: [r[i] for r in by_rank] for i, name in enumerate(NAMES) if i < len(by_rank[0])}
    return by_precision


@pytest.mark.parametrize("name", NAMES)
def test_master_weights_are_never_rounded_to_16_bits(trained: dict[str, dict[str, list[Trained]]], name: str) -> None:
    exact = trained["fp32"][NAMES[0]][0].initial  # tensor rank 0: every slice begins at 0
    for rank in trained["bf16"][name]:
        if rank.rank == 0:
            for parameter, weight in rank.initial.items():
                part = exact[parameter]
                assert torch.equal(weight[tuple(slice(0, size) for size in part.shape)], part), parameter
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in exact.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_added_up_in_fp32(trained: dict[str, dict[str, list[Trained]]], name: str) -> None:
    for rank in trained["bf16"][name]:
        assert rank.mantissas > 256


@pytest.mark.parametrize("name", NAMES)
def test_losses_stay_close_to_fp32(trained: dict[str, dict[str, list[Trained]]], name: str) -> None:
    expected = trained["fp32"][NAMES[0]][0].steps
    for rank in trained["bf16"][name]:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank.steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=3e-3)
            assert norm == pytest.approx(expected_norm, rel=3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_are_the_fp32_ones(trained: dict[str, dict[str, list[Trained]]], runs: Path, name: str) -> None:
    assert name in trained["bf16"]
    checkpoint = open_checkpoint(runs / "bf16" / name)
    exact = open_checkpoint(runs / "fp32" / NAMES[0])
    for parameter in exact.manifest.tensors:
        weight = checkpoint.tensor(parameter, kind="weight")
        torch.testing.assert_close(weight, exact.tensor(parameter, kind="weight"), atol=2e-2, rtol=0, msg=parameter)
        if weight.ndim > 1:
            assert not torch.equal(weight, weight.bfloat16().float()), parameter
