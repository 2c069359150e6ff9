"""A position method and a kernel of this file, registered as docs/extending.md says, in a whole small run."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.backends import BACKENDS, Backend
from configs.choices import OPTIMIZERS, OptimizerChoice
from configs.errors import InputError
from configs.load import load_run
from configs.positions import POSITIONS, Position
from configs.schema import Model, Train
from parallel.axes import Group
from parallel.parameter import Shard
from tests.support.one_rank import one_rank
from training.checkpoint.read import open_checkpoint
from training.export.run import export_checkpoint
from training.model.positions.bias import Bias, within
from training.model.positions.method import PositionMethod
from training.model.proof.certificate import WrongPositions
from training.model.single import load_single
from training.model.windows import LosslessWindows

RUN = ("model.position=logarithmic", "model.attention=headwise", "model.window=9", "data.split=0.2")


class LogarithmicBias:
    """Minus the logarithm of one more than the distance, for every head."""

    local_slopes = None
    learned = False
    causal_only = False
    lossless: LosslessWindows | None = None
    window: int | None = None

    def slope_of(self, device: torch.device) -> None:
        """Return None: there are no slopes."""

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
        bias = -distance.clamp(min=0).double().log1p().masked_fill(distance < 0, torch.inf)
        return within(bias.to(device, dtype)[None, None], window=self.window)


class Logarithmic(PositionMethod):
    """A penalty that grows with the logarithm of the distance."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        super().__init__(model, tensor=tensor, table=table)
        self.bias: Bias = LogarithmicBias()

    def penalty(self, distances: int) -> Tensor:
        """Return what the certificate expects, [local_heads, distances] fp64."""
        return -torch.arange(1, distances + 1).double().log().expand(len(self.heads), -1)


class Promising(Logarithmic):
    """The same, with a promise that it does not keep."""

    def penalty(self, distances: int) -> Tensor:
        return 1.01 * super().penalty(distances)


class Headwise:
    """Attention one head at a time."""

    def __init__(self, bias: Bias) -> None:
        self.bias = bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.bias(rows=q.shape[2], keys=k.shape[2], device=q.device, dtype=q.dtype).expand(
            -1, q.shape[1], -1, -1
        )
        heads = [
            (q[:, head] @ k[:, head].mT / q.shape[-1] ** 0.5 + bias[:, head]).softmax(-1) @ v[:, head]
            for head in range(q.shape[1])
        ]
        return torch.stack(heads, dim=1)


def register_position(monkeypatch: pytest.MonkeyPatch, method: type[PositionMethod]) -> None:
    row = Position("logarithmic", f"{__name__}.{method.__name__}", title="logarithmic penalty", bias="table")
    monkeypatch.setitem(POSITIONS, "logarithmic", row)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    register_position(monkeypatch, Logarithmic)
    backend = Backend(
        name="headwise",
        implementation=f"{__name__}.Headwise",
        what="a loop over heads",
        biases=("none", "table"),
        precisions=("fp32",),
        head_dims=(1, 64),
        devices=("cpu",),
        capability=(0, 0),
        package=None,
        memory="length x length",
        has_run="here",
    )
    monkeypatch.setitem(BACKENDS, "headwise", backend)
    return monkeypatch


def test_a_new_position_and_kernel_train(registered: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with one_rank(tmp_path, *RUN) as rank:
        assert rank.start(run_dir, "evaluate.every=1", "evaluate.samples=2", steps=2).step == 0
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["loss"] < 10 and 0 < step["validation_loss"] < 10 for step in steps)
    # The checkpoint loads by the names in its config, on another kernel, and is certified again.
    single = load_single(open_checkpoint(run_dir))
    (reader,) = single.certificate["ranks"]
    assert (reader["position"], reader["backend"], reader["slopes_sha256"]) == ("logarithmic", "sdpa", None)
    assert reader["error"] < 1e-6
    with pytest.raises(InputError, match=r"cannot hold model\.position logarithmic \(it holds alibi\)"):
        export_checkpoint(run_dir, format="hf", out=tmp_path / "out")
    with pytest.raises(
        InputError, match=r"the code of --with-code cannot hold model\.position logarithmic \(it holds alibi,"
    ):
        export_checkpoint(run_dir, format="hf", out=tmp_path / "out", with_code=True)
    assert not (tmp_path / "out").exists()


def test_a_promise_that_is_not_kept_is_refused(registered: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register_position(registered, Promising)
    with pytest.raises(WrongPositions, match="from what its position method promises"):
        with one_rank(tmp_path, *RUN):
            pytest.fail("an engine was built on wrong positions")


def momentum(parameters: Iterable[nn.Parameter], *, train: Train) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=train.learning_rate, momentum=0.9, fused=True)


def register_optimizer(monkeypatch: pytest.MonkeyPatch, *moments: str) -> None:
    row = OptimizerChoice("momentum", f"{__name__}.momentum", moments=moments)
    monkeypatch.setitem(OPTIMIZERS, "momentum", row)


def test_a_new_optimizer_names_all_that_it_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register_optimizer(monkeypatch, "momentum_buffer")
    with one_rank(tmp_path, "train.optimizer=momentum") as rank:
        rank.start(tmp_path / "run", steps=1)
    kept = {file.name for file in (tmp_path / "run/checkpoints/step_0000001").glob("stage_*")}
    assert kept == {f"stage_00_tensor_00.{kind}.safetensors" for kind in ("weight", "momentum_buffer")}
    # Of another name it would be saved as zeros, and a resume would begin without it.
    register_optimizer(monkeypatch, "buffer")
    with (
        one_rank(tmp_path, "train.optimizer=momentum") as rank,
        pytest.raises(AssertionError, match=r"keeps \['buffer', 'momentum_buffer'\], its row in .* \['buffer'\]"),
    ):
        rank.start(tmp_path / "other", steps=1)


@pytest.mark.usefixtures("registered")
def test_new_words_are_checked_like_all_others() -> None:
    refusals = {
        ("model.position=logarithmic", "model.attention=flex"): "flex cannot compute model.position logarithmic: use",
        ("model.attention=headwise",): "headwise cannot compute model.position alibi: use reference or sdpa or flex",
        ("model.position=other",): "'t5', 'kerple', 'sandwich', 'none' or 'logarithmic', got 'other'",
    }
    for overrides, message in refusals.items():
        with pytest.raises(InputError, match=message):
            load_run("demo", overrides=list(overrides))
    with pytest.raises(InputError, match="headwise cannot compute train.precision bf16: use reference or sdpa"):
        load_run("demo", overrides=[*RUN, "train.precision=bf16"])
