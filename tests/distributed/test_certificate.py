"""If one of two ranks has wrong positions, both name it, refuse to train, and record their measurements."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.axes import Group
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import ProcessRank
from tests.support.layouts import build, config_of
from tests.support.ranks import run_ranks
from training.build import record_refusal
from training.model.positions import alibi, bias
from training.model.positions.alibi import local_slopes
from training.model.positions.bias import causal_bias
from training.model.proof.certificate import WrongPositions
from training.preflight import Ready


def first_heads_slopes(heads: int, *, tensor: Group, bias_max: int, scaling: None = None) -> Tensor:
    """Return the first rank's slopes on every rank, a fault that other implementations have had."""
    return local_slopes(heads, tensor=Group(0, tensor.size, None), bias_max=bias_max)


def inverted_bias(local: Tensor, *, queries: int, keys: int) -> Tensor:
    """Return the bias of the right slopes with the wrong sign."""
    right = causal_bias(local, queries=queries, keys=keys)
    return torch.where(right.isinf(), right, -right)


FAULTS = ((alibi, "local_slopes", first_heads_slopes), (bias, "causal_bias", inverted_bias))


def refusals_of(process: ProcessRank, *, folder: Path) -> list[str]:
    """Return this rank's error for each fault that rank 1 is built with."""
    refusals = []
    config = config_of({"tensor": 2, "pipeline": 1, "zero": 1}, run_dir=folder)
    layout = Layout.of(config, world_size=process.world_size)
    ready = Ready(config, folder, layout, prepared=None, newest=None)  # type: ignore[arg-type]
    groups = make_groups(layout)
    for module, name, wrong in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            if process.rank == 1:
                patch.setattr(module, name, wrong)
            with pytest.raises(WrongPositions) as refused, record_refusal(ready, groups=groups):
                build(config, world_size=process.world_size)
        refusals.append(str(refused.value))
    return refusals


def test_both_ranks_name_the_wrong_one_and_record_the_refusal(tmp_path: Path) -> None:
    refusals, others = run_ranks(refusals_of, ranks=2, arguments={"folder": tmp_path})
    assert refusals == others
    slopes, sign = refusals
    rank = "positions are wrong: rank 1 (tensor 1, stage 0, data 0) does not "
    assert slopes.startswith(f"{rank}have the slopes of its heads 2, 3; ")
    assert sign.startswith(f"{rank}prefer near keys (last key's weight minus the first's -")
    assert "set another model.attention" in sign
    lines = [json.loads(line) for line in (tmp_path / "certificates.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines] == refusals
    right, wrong = lines[0]["ranks"]
    assert right["error"] < 1e-5 < wrong["error"]
    assert [line["ranks"][1]["recency"] > 0 for line in lines] == [True, False]
