"""One of two ranks with wrong positions: both refuse, name it, and what they measured is written down."""

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
from training import run
from training.model import bias, decoder
from training.model.alibi import causal_bias, local_slopes
from training.model.proof.certificate import WrongPositions
from training.preflight import Ready


def first_heads_slopes(heads: int, *, tensor: Group) -> Tensor:
    """What peers shipped: every rank takes the first rank's."""
    return local_slopes(heads, tensor=Group(0, tensor.size, None))


def inverted_bias(local: Tensor, *, queries: int, keys: int) -> Tensor:
    """Right slopes, and the sign turned where they are used."""
    found = causal_bias(local, queries=queries, keys=keys)
    return torch.where(found.isinf(), found, -found)


FAULTS = ((decoder, "local_slopes", first_heads_slopes), (bias, "causal_bias", inverted_bias))


def refusals_of(place: ProcessRank, *, folder: Path) -> list[str]:
    """Return what this rank says where rank 1 is built with each fault."""
    found = []
    config = config_of({"tensor": 2, "pipeline": 1, "zero": 1}, run_dir=folder)
    layout = Layout.of(config, world_size=place.world_size)
    ready = Ready(config, folder, layout, prepared=None, newest=None)  # type: ignore[arg-type]
    groups = make_groups(layout)
    for module, name, wrong in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            if place.rank == 1:
                patch.setattr(module, name, wrong)
            with pytest.raises(WrongPositions) as refused, run._refusal_recorded(ready, groups=groups):
                build(config, world_size=place.world_size)
        found.append(str(refused.value))
    return found


def test_both_ranks_name_the_wrong_one_and_the_refusal_is_written_down(tmp_path: Path) -> None:
    said, said_too = run_ranks(refusals_of, ranks=2, arguments={"folder": tmp_path})
    assert said == said_too
    slopes, sign = said
    rank = "positions are wrong: rank 1 (tensor 1, stage 0, data 0) does not "
    assert slopes.startswith(f"{rank}have the slopes of its heads 2, 3; ")
    assert sign.startswith(f"{rank}prefer near keys (last less first -")
    assert "set another model.attention" in sign
    lines = [json.loads(line) for line in (tmp_path / "certificates.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines] == said
    right, wrong = lines[0]["ranks"]
    assert right["error"] < 1e-5 < wrong["error"]
    assert [line["ranks"][1]["recency"] > 0 for line in lines] == [True, False]
