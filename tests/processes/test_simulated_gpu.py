"""Ranks of GPU jobs that train and evaluate on tensors that say they lie on a GPU: devices, waiting and memory."""

from typing import Any

import pytest

from tests.support.simulated_gpu import Case, simulate

SHAPE = ("model.layers=2", "train.micro_batch=8", "train.global_batch=16", "evaluate.validation_lengths=[]")
STAGES = ("parallel.tensor=2", "parallel.pipeline=2", "model.layers=4")
CASES = {
    "default": Case(SHAPE),
    "swiglu, selective": Case((*SHAPE, "model.family=jais", "train.recompute=selective", "train.z_loss=1e-4")),
    "documents, recompute": Case((*SHAPE, "data.mask_documents=true", "train.recompute=true")),
    "windows": Case((*SHAPE, "data.sequence_length=4096", "train.micro_batch=2", "train.global_batch=4"), 0, 1),
    "tf32, rotary, dropout": Case((*SHAPE, "train.precision=tf32", "model.position=rotary", "model.dropout=0.1")),
    "first stage": Case((*SHAPE, *STAGES), 0, 4),
    "last stage, split sequence, t5, overlap": Case(
        (
            *SHAPE,
            *STAGES,
            "parallel.sequence=true",
            "parallel.overlap=true",
            "model.position=t5",
            "train.global_batch=32",
        ),
        7,
        8,
    ),
    "muon, tensor ranks": Case((*SHAPE, "train.optimizer=muon", "parallel.tensor=2", "train.global_batch=32"), 3, 4),
    "fp16, zero 2": Case((*SHAPE, "train.precision=fp16", "parallel.zero=2"), 1, 2),
    "zero 3, muon": Case((*SHAPE, "parallel.zero=3", "train.optimizer=muon"), 1, 2),
    "offload": Case((*SHAPE, "parallel.offload=cpu", "parallel.tensor=2", "train.global_batch=32"), 2, 4),
}
INFERENCE = {
    "one process": Case(("model.layers=2",), infers=True),
    "t5 in documents": Case(("model.layers=2", "model.position=t5", "data.mask_documents=true"), infers=True),
    "rank 0 asks": Case(STAGES, 0, 4, infers=True),
    "the last stage serves": Case(STAGES, 3, 4, infers=True),
}
# DeepSpeed waits where it looks whether gradients are finite, or how large each is on the CPU, and for their reduction.
WAITS = {"fp16, zero 2": 7, "zero 3, muon": 6, "offload": 47}
OURS = {"offload": 2}  # of those: the norm goes to the GPU, where it is summed, and back

# The first rank sends the size of a pass and its tokens, and the others read the size, which is not counted here.
INFERENCE_WAITS = {"losses": 0, "score": 2, "capture": 0, "token": 1, "cache repeated": 1, "pass": 2, "passes": 0}


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    every, tests = CASES | INFERENCE, request.session.items
    chosen = {name: every[name] for name in every if any(f"[{name}]" in test.name for test in tests)}
    return dict(zip(chosen, simulate(list(chosen.values())), strict=True))


@pytest.mark.parametrize("name", CASES | INFERENCE)
def test_a_ranks_tensors_lie_on_its_gpu(name: str, seen: dict[str, dict[str, Any]]) -> None:
    assert "error" not in seen[name], seen[name]["error"]
    assert seen[name]["off_device"] == []
    # in the certificate too, which would else take the next kernel
    assert seen[name]["attention"] == ("sdpa" if "t5" in name else "flex")


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_gpu(name: str, seen: dict[str, dict[str, Any]]) -> None:
    waits = seen[name]["waits"]
    assert len(waits) == WAITS.get(name, 0), "\n".join(waits)
    assert len([wait for wait in waits if " at deepspeed/" not in wait]) == OURS.get(name, 0), "\n".join(waits)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_check_estimates(name: str, seen: dict[str, dict[str, Any]]) -> None:
    assert seen[name]["estimate"] == pytest.approx(seen[name]["peak"], rel=0.05)


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_waits_where_it_reads_alone(name: str, seen: dict[str, dict[str, Any]]) -> None:
    waits = seen[name]["waits"]
    assert {kind: len(each) for kind, each in waits.items()} == {kind: INFERENCE_WAITS[kind] for kind in waits}, waits
