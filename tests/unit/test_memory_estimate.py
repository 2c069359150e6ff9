"""The estimate of a rank's memory, what would need less, and `check --memory`."""

import json
import time
from pathlib import Path

import pytest

from configs.backends import AUTO, BACKENDS
from configs.load import load_run
from configs.schema import RunConfig
from launch import machine
from parallel.layout import Layout
from tests.support.command_line import Call, refused
from training import host_memory
from training.host_memory import MemoryLimit
from training.memory import StageMemory, estimate_memory
from training.memory_changes import change_lines, memory_changes
from training.model.positions.bias import QUERY_BLOCK

ONE_RANK = ("parallel.tensor=1", "parallel.pipeline=1", "train.global_batch=16")


def run_of(*overrides: str) -> RunConfig:
    return load_run("alibi-1b3", overrides=list(overrides))


def stages_of(*overrides: str, ranks: int) -> tuple[StageMemory, ...]:
    config = run_of(*overrides)
    return estimate_memory(config, layout=Layout.of(config, world_size=ranks), on_gpu=True).stages


def changes_of(*overrides: str, ranks: int, on_gpu: bool = True) -> list[str]:
    config = run_of(*overrides)
    return change_lines(memory_changes(config, layout=Layout.of(config, world_size=ranks), on_gpu=on_gpu))


# Torch's peak of allocated GB on one H100: bf16, ZeRO-1, two micro-batches of 8 x 1024 a step.
@pytest.mark.parametrize(
    ("attention", "position", "measured"), [("sdpa", "alibi", 44.2), ("flex", "alibi", 43.3), ("sdpa", "none", 43.3)]
)
def test_the_estimate_is_what_an_h100_held(attention: str, position: str, measured: float) -> None:
    (stage,) = stages_of(*ONE_RANK, f"model.attention={attention}", f"model.position={position}", ranks=1)
    assert (stage.total - stage.overhead) / 1e9 == pytest.approx(measured, rel=0.03)


def test_the_kernel_takes_as_many_queries_as_its_row_says() -> None:
    assert BACKENDS[AUTO].query_block == QUERY_BLOCK


def test_ranks_share_the_state_as_the_layout_says() -> None:
    (alone,) = stages_of(*ONE_RANK, ranks=1)
    (shared,) = stages_of(*ONE_RANK, ranks=2)
    assert shared.optimizer == pytest.approx(alone.optimizer / 2, rel=1e-6)
    assert (shared.weights, shared.activations) == (alone.weights, alone.activations)
    (partitioned,) = stages_of(*ONE_RANK, "parallel.zero=3", ranks=2)
    assert partitioned.weights == pytest.approx(alone.weights / 2, rel=1e-6)
    (split,) = stages_of("parallel.tensor=2", "parallel.pipeline=1", ranks=2)
    assert alone.weights / 2 < split.weights < 0.51 * alone.weights  # norms and biases are whole
    first, last = stages_of("parallel.tensor=1", ranks=2)
    assert first.activations > 1.9 * last.activations, "two micro-batches in flight"
    assert last.head > first.head, "the logits"
    (recomputed,) = stages_of(*ONE_RANK, "train.recompute=true", ranks=1)
    assert recomputed.activations < alone.activations / 10


def test_changes_are_in_order_legal_and_new() -> None:
    assert changes_of(*ONE_RANK, ranks=2) == [
        "train.micro_batch 8 -> 4",
        "train.recompute false -> true",
        "parallel.zero 1 -> 2 or 3",
        "parallel.offload none -> cpu",
        "parallel.tensor 1 -> 2",
        "parallel.pipeline 1 -> 2",
    ]
    # one data rank has nobody to share with
    done = ("train.micro_batch=1", "train.recompute=true")
    assert changes_of(*done, ranks=4, on_gpu=False) == [
        "parallel.tensor 2 -> 4, with 8 ranks",
        "parallel.pipeline 2 -> 3, with 6 ranks",
    ]
    offloaded = (*ONE_RANK, *done, "parallel.zero=3", "parallel.offload=cpu")
    assert changes_of(*offloaded, ranks=2) == ["parallel.tensor 1 -> 2"]  # ZeRO 3 is not legal with stages
    assert changes_of(*offloaded, ranks=2, on_gpu=False)[0] == "parallel.offload cpu -> none"


def test_check_says_what_fits_and_what_to_change(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    fits = trainshort("check", "alibi-1b3", "--memory", "--gpu-memory-gb", "80")
    assert fits.code == 0
    assert "estimated for 4 ranks (tensor x pipeline; see --ranks)" in fits.out
    assert "it fits a GPU of 80.00 GB (--gpu-memory-gb)" in fits.out
    assert time.monotonic() - began < 2
    does_not = trainshort("check", "alibi-1b3", "--memory", "--gpu-memory-gb", "16", "--ranks", "8").out
    assert "it does not fit a GPU of 16.00 GB" in does_not
    words = ("train.micro_batch 8 -> 4: ", "train.recompute", "parallel.tensor", "or use a GPU")
    assert [does_not.index(word) for word in words] == sorted(does_not.index(word) for word in words)
    assert all(len(line) <= 80 for line in does_not[does_not.index("memory of a rank") :].splitlines())

    monkeypatch.setattr(machine, "gpu_count", lambda _: 0)
    monkeypatch.setattr(host_memory, "host_limit", lambda: MemoryLimit(20 * 10**9, "this machine's memory"))
    values = json.loads(trainshort("check", "alibi-1b3", "--memory", "--json").out)["memory"]
    assert (values["device"], values["available"], values["fits"]) == ("cpu", 5 * 10**9, False)
    assert values["largest"] == max(stage["total"] for stage in values["stages"])
    assert values["changes"][0]["key"] == "train.micro_batch"

    monkeypatch.setattr(machine, "gpu_count", lambda _: 8)
    monkeypatch.setattr(machine, "gpu_bytes", lambda: None)
    assert "whether it fits is not known" in trainshort("check", "alibi-1b3", "--memory").out


def test_check_refuses_options_that_mean_nothing(folder: Path, trainshort: Call) -> None:
    assert "add --memory" in refused(trainshort, "check", "demo", "--gpu-memory-gb", "80")
    assert "add --memory" in refused(trainshort, "check", "demo", "--ranks", "4")
    assert "must be a multiple of" in refused(trainshort, "check", "demo", "--memory", "--ranks", "3")
    for value in ("0", "-80", "nan", "inf", "80GB", ""):
        assert "must be a number of GB over 0" in refused(
            trainshort, "check", "demo", "--memory", f"--gpu-memory-gb={value}"
        )
