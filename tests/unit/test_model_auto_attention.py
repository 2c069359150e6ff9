"""What `auto` means for a call, and the check of gradients before a kernel trains."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from configs.backends import BACKENDS
from configs.schema import Model
from parallel.groups import lone_groups
from tests.support.models import LAYERS, learned_bias, make_decoder
from training.model.attention import AutoAttention, kind_of
from training.model.kernels.flex import Flex, flex_kernel
from training.model.kernels.reference import Reference
from training.model.positions.alibi import slopes
from training.model.positions.bias import SlopeBias
from training.model.proof.certificate import WrongPositions, certify
from training.model.proof.kernel_error import kernel_error

HEADS, WIDTH, CPU = 4, 16, torch.device("cpu")


class WrongGradients(Reference):
    """Right outputs, whose gradients are nan."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().__call__(q, k, v)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * torch.nan)
        return out


class Fails(Reference):
    """A kernel that its compiler refuses in training."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("no such kernel\nand much more")
        return super().__call__(q, k, v)


class NeverRuns(Reference):
    """A kernel that its compiler refuses everywhere, for the reason that no RuntimeError is."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise FailOnRecompileLimitHit("no more of it\nand much more")


@pytest.fixture(params=[WrongGradients, Fails])
def broken_flex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Reference]:
    """`flex` runs on CPUs and is wrong in training."""
    replace_flex(monkeypatch, request.param)
    return request.param


def replace_flex(monkeypatch: pytest.MonkeyPatch, kernel: type[Reference]) -> None:
    row = replace(BACKENDS["flex"], implementation=f"{__name__}.{kernel.__name__}", devices=("cpu", "cuda"))
    monkeypatch.setitem(BACKENDS, "flex", row)


def test_auto_is_sdpa_on_a_cpu_for_every_bias() -> None:
    alibi = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64))
    biases = {"slopes": alibi, "none": SlopeBias(None), "table": learned_bias(HEADS)}
    for kind, bias in biases.items():
        assert kind_of(bias) == kind
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            like = torch.empty(1, HEADS, 1, WIDTH, dtype=dtype)
            assert AutoAttention(bias).backend(like).name == "sdpa"


def certified(attention: str) -> str:
    decoder = make_decoder(HEADS, head_dim=WIDTH, backend=attention)
    model = Model(layers=LAYERS, hidden=HEADS * WIDTH, heads=HEADS, attention=attention)
    return certify(decoder, model, groups=lone_groups(), precision="fp32", device=CPU)[0].backend


@pytest.mark.usefixtures("broken_flex")
def test_auto_trains_with_no_kernel_whose_gradients_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert certified("auto") == "sdpa"
    (line,) = caplog.messages
    assert line.startswith("attention flex is not used: it")
    assert line.endswith("; using sdpa")
    assert "and much more" not in line
    with torch.no_grad():  # a checkpoint is only read
        assert certified("auto") == "flex"


@pytest.mark.usefixtures("broken_flex")
def test_a_named_kernel_with_wrong_gradients_is_refused() -> None:
    with pytest.raises(WrongPositions, match=r"rank 0 .* cannot train with attention flex: it.*set another model"):
        certified("flex")


@pytest.mark.parametrize("trains", [True, False])
def test_a_kernel_that_never_runs_is_replaced_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trains: bool
) -> None:
    replace_flex(monkeypatch, NeverRuns)
    with torch.set_grad_enabled(trains), caplog.at_level(logging.WARNING):
        assert certified("auto") == "sdpa"
        assert caplog.messages == ["attention flex is not used: it fails here (no more of it); using sdpa"]
        use = "train" if trains else "compute"
        with pytest.raises(
            WrongPositions, match=rf"rank 0 .* cannot {use} with attention flex: it fails here \(no"
        ) as e:
            certified("flex")
    assert math.isnan(e.value.certificates[0].error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_many_models_of_one_process_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flex_kernel.cache_clear()
    try:
        with torch.no_grad():
            for heads in range(1, 11):  # torch's own limit is 8
                bias = SlopeBias(torch.tensor(slopes(heads), dtype=torch.float64))
                q = torch.randn(1, heads, 130, WIDTH)
                torch.testing.assert_close(Flex(bias, compiled=True)(q, q, q), Reference(bias)(q, q, q))
    finally:
        flex_kernel.cache_clear()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_right_gradients_are_within_the_limit(backend: str, dtype: torch.dtype, limit: float) -> None:
    make: Callable[..., Reference] = BACKENDS[backend].load()
    for heads, head_dim in ((4, 16), (16, 128)):
        bias = SlopeBias(torch.tensor(slopes(heads), dtype=torch.float64))
        assert kernel_error(make(bias), heads=heads, head_dim=head_dim, dtype=dtype, device=CPU) < limit / 2
