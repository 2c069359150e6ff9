"""Muon works on whole matrices in every layout, also where ZeRO and tensor ranks cut them."""

from pathlib import Path

import pytest

from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, save, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again
from training.checkpoint.read import Checkpoint, open_checkpoint

RANKS, STEPS = 4, range(3)
BF16 = "train.precision=bf16"
WHOLE = "whole"  # each rank has all of each matrix, and nothing is exchanged
CASES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    WHOLE: ({"tensor": 1, "pipeline": 1, "zero": 0}, ()),
    "tensor 2, zero 2": ({"tensor": 2, "pipeline": 1, "zero": 2}, ("parallel.sequence=true",)),
    "tensor 2, zero 3": ({"tensor": 2, "pipeline": 1, "zero": 3}, ()),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2, "zero": 1}, ()),
    # The stages between have no embedding, and DeepSpeed's ZeRO sums the gradient norm.
    "pipeline 4, offload": ({"tensor": 1, "pipeline": 4, "zero": 1}, ("parallel.offload=cpu",)),
    "tensor 2, zero 1, bf16": ({"tensor": 2, "pipeline": 1, "zero": 1}, (BF16,)),
    "tensor 2, zero 3, offload, bf16": ({"tensor": 2, "pipeline": 1, "zero": 3}, ("parallel.offload=cpu", BF16)),
}
Steps = list[tuple[float, float]]


def train_cases(process: ProcessRank, *, folder: Path) -> dict[str, Steps]:
    """Train and save each case; return the losses and gradient norms of its steps."""
    steps = {}
    for number, (name, (keys, more)) in enumerate(CASES.items()):
        start_again(process, number=number)
        config = config_of(keys, run_dir=folder / name, more=("train.optimizer=muon", *more))
        engine, groups, layout = build(config, world_size=process.world_size)
        figures = [
            take_step(engine, tokens_of(step), groups=groups, layout=layout, learning_rate=3e-3) for step in STEPS
        ]
        save(engine, config, groups=groups, tokenizer=folder / "tokenizer.model", step=STEPS.stop)
        steps[name] = [(each.loss, each.grad_norm) for each in figures]
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def trained(runs: Path) -> list[dict[str, Steps]]:
    """Losses and gradient norms by case, for each rank."""
    (runs / "tokenizer.model").write_bytes(b"no test here reads it")
    return run_ranks(train_cases, ranks=RANKS, arguments={"folder": runs})


def difference(one: Checkpoint, other: Checkpoint, *, kind: str) -> float:
    """Return the largest difference of two checkpoints' tensors, relative to the second one's, in the L2 norm."""
    names = [name for name, entry in other.manifest.tensors.items() if name.startswith("blocks.")]
    pairs = ((one.tensor(name, kind=kind), other.tensor(name, kind=kind)) for name in names)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.ndim == 2)


@pytest.mark.parametrize("case", [case for case in CASES if case != WHOLE])
def test_matrices_that_are_cut_are_stepped_whole(trained: list[dict[str, Steps]], runs: Path, case: str) -> None:
    close = 2e-3 if BF16 in CASES[case][1] else 1e-6  # the steps change the weights by a tenth
    for rank in trained:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank[case], trained[0][WHOLE], strict=True):
            assert loss == pytest.approx(expected_loss, rel=close)
            assert norm == pytest.approx(expected_norm, rel=10 * close)
    checkpoint, expected = open_checkpoint(runs / case), open_checkpoint(runs / WHOLE)
    assert difference(checkpoint, expected, kind="weight") < 3 * close
    assert difference(checkpoint, expected, kind="exp_avg") < 20 * close
