"""Before a run trains, its attention is compared on the shape and strides that it trains on, windows included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import load_run
from configs.schema import Model
from parallel import compiled
from parallel.groups import lone_groups
from tests.support.models import make_decoder
from tests.support.one_rank import one_rank
from training.model.kernels import sdpa_cpu
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.proof.certificate import WrongPositions, certify
from training.model.proof.kernel_error import LONGEST, ROWS, SHORT, Batch, batches_of_training, kernel_error

CPU = torch.device("cpu")


def test_a_long_sequence_is_compared_where_windows_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(8, head_dim=16)
    model = Model(layers=2, hidden=128, heads=8, attention="sdpa")
    told: Any = {"groups": lone_groups(), "precision": "fp32", "device": CPU}
    longer = Batch.of_training(2, 1024, apart=False)
    certify(decoder, model, **told, batches=[longer])

    def too_late(distances: Tensor, *, position: int, step: int) -> list[int]:
        return [max(0, position - 600) // step * step] * distances.shape[1]

    monkeypatch.setattr(sdpa_cpu, "first_keys", too_late)
    certify(decoder, model, **told, batches=[SHORT])
    with pytest.raises(WrongPositions, match=r"cannot train .*: its output or gradients are wrong by"):
        certify(decoder, model, **told, batches=[longer])


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_the_last_rows_and_their_gradients_are_compared(wrong: str) -> None:
    attend = Sdpa(make_decoder(4).layers[1].attend.bias)  # type: ignore[union-attr,arg-type]
    shape: Any = {"heads": 4, "head_dim": 8, "dtype": torch.float32, "device": CPU, "batch": Batch(2, 300)}
    assert kernel_error(attend, **shape, documents=True) < 1e-5

    class Wrong:
        bias = attend.bias

        def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)
            off = torch.zeros_like(out)
            off[1, 3, -ROWS if wrong == "output" else 5] = 0.01
            return out + off if wrong == "output" else out + (off * v - (off * v).detach()).sum(2, keepdim=True)

    assert kernel_error(Wrong(), **shape) > 1e-3


@pytest.mark.parametrize("kernel", [Reference, Sdpa])
def test_a_window_of_one_token_is_compared(kernel: type[Reference] | type[Sdpa]) -> None:
    for position in ("alibi", "t5", "none"):
        bias = make_decoder(4, position=position, window=1).layers[1].attend.bias  # type: ignore[union-attr]
        shape: Any = {"heads": 4, "head_dim": 8, "dtype": torch.float32, "device": CPU, "batch": Batch(2, 300)}
        assert kernel_error(kernel(bias), **shape, documents=True) < 1e-5  # type: ignore[arg-type]

        class Wrong:
            def __init__(self, attend: Reference | Sdpa) -> None:
                self.bias, self._attend = attend.bias, attend

            def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return self._attend(q, k, v) + (q - q.detach()) * 0.01  # queries get a gradient

        assert kernel_error(Wrong(kernel(bias)), **shape) > 1e-3  # type: ignore[arg-type]


def test_long_sequences_are_compared_alone() -> None:
    assert Batch.of_training(16, LONGEST, apart=True) == Batch(16, LONGEST, apart=True)
    assert Batch.of_training(16, LONGEST + 1, apart=True) == Batch(1, LONGEST, apart=True)
    assert Batch.of_training(4, 64, apart=False) == Batch(4, ROWS)


def test_each_length_of_a_warm_up_is_compared() -> None:
    keys = ["data.sequence_length=4096", "train.micro_batch=2", "train.global_batch=2"]
    run = load_run("demo", overrides=[*keys, "train.length_warmup=[[64, 1], [128, 1], [512, 1]]"])
    assert batches_of_training(run, apart=True) == [
        Batch(64, ROWS, True),
        Batch(16, 512, True),
        Batch(1, LONGEST, True),
    ]
    short = load_run("demo", overrides=["data.sequence_length=64", "train.micro_batch=2"])
    assert batches_of_training(short, apart=False) == [Batch(2, ROWS)]


@pytest.mark.parametrize("compiles", [False, True])
def test_each_step_has_a_shape_that_was_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiles: bool
) -> None:
    seen: list[tuple[Any, ...]] = []
    attend = Sdpa.__call__

    def recorded(self: Sdpa, q: Tensor, k: Tensor, v: Tensor, documents: None = None) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in (q, k, v)))
        return attend(self, q, k, v, documents)

    monkeypatch.setattr(Sdpa, "__call__", recorded)
    overrides = ["train.micro_batch=2", "train.global_batch=2"]
    overrides += ["data.sequence_length=272", "train.length_warmup=[[136, 1]]"]
    if compiles:
        monkeypatch.setattr(compiled, "missing_compiler", lambda *_, **__: None)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # as compiled: in one piece each
        overrides.append("train.compile=on")
    with one_rank(tmp_path, *overrides) as rank:
        compared = set(seen)
        rank.start(tmp_path / "run", steps=2)
    assert {shapes[0][0][2] for shapes in compared} == {136, 272}
    assert set(seen) == compared
