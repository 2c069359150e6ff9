"""Every position method has the losses, norms and logits of one rank in several layouts."""

from pathlib import Path

import pytest
import torch

from parallel.start import ProcessRank
from tests.support.layouts import LENGTH, LONG, Trained, config_of, name_of, train_one, whole_of
from tests.support.ranks import run_ranks, start_again
from training.checkpoint.read import open_checkpoint

LONE = {"tensor": 1, "pipeline": 1, "zero": 1}
STAGED = {"tensor": 2, "pipeline": 2, "zero": 1}
SPREAD = {"tensor": 1, "pipeline": 4, "zero": 1}  # the learned bias on four stages
SHARDED = {"tensor": 2, "pipeline": 1, "zero": 3}
MORE = {"none": ("model.window=12",)}  # without positions, a sliding window
CASES = [("t5", STAGED), ("t5", SPREAD), ("t5", SHARDED), ("rotary", STAGED), ("sinusoidal", STAGED), ("none", STAGED)]


def train_positions(
    process: ProcessRank, *, cases: list[tuple[str, dict[str, int]]], folder: Path, tokenizer: Path
) -> list[Trained]:
    """Train each case, a position method in a layout; return what this rank measured."""
    trained = []
    for number, (position, keys) in enumerate(cases):
        start_again(process, number=number)
        run_dir = folder / f"{position}_{name_of(keys, ranks=process.world_size)}"
        config = config_of(keys, run_dir=run_dir, more=(f"model.position={position}", *MORE.get(position, ())))
        long = LONG if position in MORE else LENGTH  # only a window leaves out scores
        trained.append(train_one(process, config, steps=range(4), tokenizer=tokenizer, start_from=None, long=long))
    return trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("positions")


@pytest.fixture(scope="module")
def trained(runs: Path, tokenizer: Path) -> dict[tuple[str, int], list[Trained]]:
    """Each case's ranks, by position method and number of the case; number -1 is one rank alone."""
    lone = [(position, LONE) for position in dict.fromkeys(position for position, _ in CASES)]
    by_case = {}
    for ranks, cases in ((1, lone), (4, CASES)):
        by_rank = run_ranks(
            train_positions, ranks=ranks, arguments={"cases": cases, "folder": runs, "tokenizer": tokenizer}
        )
        for index, (position, _) in enumerate(cases):
            by_case[position, index if ranks > 1 else -1] = [results[index] for results in by_rank]
    return by_case


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_layout_changes_no_loss_norm_or_logit(trained: dict[tuple[str, int], list[Trained]], case: int) -> None:
    position = CASES[case][0]
    lone = trained[position, -1][0]
    for rank in trained[position, case]:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank.steps, lone.steps, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert rank.held_out_loss == pytest.approx(lone.held_out_loss, rel=1e-5)
        assert rank.long_density == lone.long_density
    assert (lone.long_density is None) == (position not in MORE), "a window leaves out scores that a step then counts"
    assert lone.long_density is None or lone.long_density < 0.53  # blocks of 256 queries, of 768
    for length in (LENGTH, 4 * LENGTH):
        logits, expected = (
            whole_of(ranks, "logits", length) for ranks in (trained[position, case], trained[position, -1])
        )
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_only_a_learned_bias_is_saved_and_it_is_saved_once(
    trained: dict[tuple[str, int], list[Trained]], runs: Path
) -> None:
    lone = open_checkpoint(runs / f"t5_{name_of(LONE, ranks=1)}")
    for keys in (STAGED, SPREAD, SHARDED):
        checkpoint = open_checkpoint(runs / f"t5_{name_of(keys, ranks=4)}")
        assert checkpoint.manifest.tensors["positions.t5.weight"].shape == (4, 32)
        assert checkpoint.manifest.tensors["positions.t5.weight"].stage == 0
        for kind in ("weight", "exp_avg"):
            one, other = (some.tensor("positions.t5.weight", kind=kind) for some in (checkpoint, lone))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert lone.tensor("positions.t5.weight", kind="exp_avg").abs().max() > 0
    for position in ("rotary", "sinusoidal", "none"):
        names = open_checkpoint(runs / f"{position}_{name_of(LONE, ranks=1)}").manifest.tensors
        assert names.keys() == lone.manifest.tensors.keys() - {"positions.t5.weight"}
