"""bf16 and fp16 keep fp32 weights in memory and in checkpoints, and their losses are close to those of fp32."""

from pathlib import Path

import pytest
import torch

from tests.support.layouts import Trained, name_of, train_layouts
from tests.support.ranks import run_ranks
from training.checkpoint.read import open_checkpoint
from training.model.proof.attention_weights import dtype_of

LAYOUTS = [
    {"tensor": 2, "pipeline": 1, "zero": 1},
    {"tensor": 2, "pipeline": 1, "zero": 2, "sequence": True},
    {"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True},
    {"tensor": 1, "pipeline": 2, "zero": 1, "offload": "cpu"},
    {"tensor": 1, "pipeline": 1, "zero": 1},
    {"tensor": 1, "pipeline": 1, "zero": 2},
    {"tensor": 1, "pipeline": 1, "zero": 3},
    {"tensor": 1, "pipeline": 1, "zero": 3, "offload": "cpu"},
]
FP16_LAYOUTS = [LAYOUTS[index] for index in (2, 3, 5, 6)]  # stages and a split sequence, offload, ZeRO 2 and 3
RANKS = 4  # without stages and tensor ranks one micro-batch each, so that only the data ranks' sum can round
BY_PRECISION = {"fp32": LAYOUTS[:1], "bf16": LAYOUTS, "fp16": FP16_LAYOUTS}
EXACT = name_of(LAYOUTS[0], ranks=RANKS)
CASES = [(half, name_of(keys, ranks=RANKS)) for half in ("bf16", "fp16") for keys in BY_PRECISION[half]]
WEIGHTS = 2e-2  # how far they may be from those of fp32: Adam moves a weight by the sign of its first gradient
LOSSES = {"bf16": 3e-3, "fp16": 3e-4}  # relative
STEPS = range(5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def trained(runs: Path) -> dict[str, dict[str, list[Trained]]]:
    """Ranks by layout, for each precision."""
    tokenizer = runs / "tokenizer.model"
    tokenizer.write_bytes(b"no test here reads it")
    by_precision: dict[str, dict[str, list[Trained]]] = {}
    for precision, layouts in BY_PRECISION.items():
        arguments = {
            "layouts": layouts,
            "steps": STEPS,
            "folder": runs / precision,
            "tokenizer": tokenizer,
            "start_from": None,
            "long": None,
            "more": (f"train.precision={precision}", "train.recompute=true", "train.clip=1e9"),
        }
        by_rank = run_ranks(train_layouts, ranks=RANKS, arguments=arguments)
        names = [name_of(keys, ranks=RANKS) for keys in layouts]
        by_precision[precision] = {name: [rank[i] for rank in by_rank] for i, name in enumerate(names)}
    return by_precision


@pytest.mark.parametrize(("half", "name"), CASES)
def test_master_weights_are_never_rounded_to_16_bits(
    trained: dict[str, dict[str, list[Trained]]], half: str, name: str
) -> None:
    exact = trained["fp32"][EXACT][0].initial  # tensor rank 0: every slice begins at 0
    for rank in trained[half][name]:
        if rank.rank == 0:
            for parameter, weight in rank.initial.items():
                part = exact[parameter]
                assert torch.equal(weight[tuple(slice(0, size) for size in part.shape)], part), parameter
    assert any(not torch.equal(weight, weight.to(dtype_of(half)).float()) for weight in exact.values())


@pytest.mark.parametrize(("half", "name"), CASES)
def test_gradients_are_added_up_in_fp32(trained: dict[str, dict[str, list[Trained]]], half: str, name: str) -> None:
    for rank in trained[half][name]:
        assert rank.wide_gradients > 0.1


@pytest.mark.parametrize(("half", "name"), CASES)
def test_losses_stay_close_to_fp32(trained: dict[str, dict[str, list[Trained]]], half: str, name: str) -> None:
    expected = trained["fp32"][EXACT][0].steps
    for rank in trained[half][name]:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank.steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=LOSSES[half])
            assert norm == pytest.approx(expected_norm, rel=10 * LOSSES[half])


@pytest.mark.parametrize(("half", "name"), CASES)
def test_saved_weights_are_the_fp32_ones(
    trained: dict[str, dict[str, list[Trained]]], runs: Path, half: str, name: str
) -> None:
    assert name in trained[half]
    checkpoint = open_checkpoint(runs / half / name)
    exact = open_checkpoint(runs / "fp32" / EXACT)
    for parameter in exact.manifest.tensors:
        weight = checkpoint.tensor(parameter, kind="weight")
        torch.testing.assert_close(weight, exact.tensor(parameter, kind="weight"), atol=WEIGHTS, rtol=0, msg=parameter)
        if weight.ndim > 1:
            assert not torch.equal(weight, weight.to(dtype_of(half)).float()), parameter
