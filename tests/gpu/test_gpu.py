"""What only a GPU can show: `make test-gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.backends import BACKENDS, misfit, missing
from training.model.alibi import slopes
from training.model.attention import MAKERS, Reference
from training.model.audit import audit
from training.model.bias import SlopeBias
from training.model.probe import TOLERANCE
from training.preflight import installed_packages

pytestmark = pytest.mark.gpu


# Those of the table that this machine can run: flash-attn is an extra, and has no fp32.
CASES = [
    (name, dtype, tolerance)
    for name in BACKENDS
    for precision, dtype, tolerance in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 3e-2))
    if misfit(BACKENDS[name], position="alibi", precision=precision, head_dim=128) is None
    and missing(BACKENDS[name], device="cuda", packages=installed_packages()) is None
]


@pytest.mark.parametrize("length", [64, 192, 1001, 1024, 2112])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES)
def test_a_backend_equals_the_reference_with_gradients(
    backend: str, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    strip = SlopeBias(torch.tensor(slopes(16), dtype=torch.float64))
    strip(rows=2, keys=4096, device=torch.device("cuda"), dtype=dtype)  # longer than the call needs
    exact = [torch.randn(1, 16, length, 128, device="cuda", dtype=dtype).double().requires_grad_() for _ in range(3)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    weight = torch.randn(1, 16, length, 128, device="cuda", dtype=torch.float64)
    expected = Reference(SlopeBias(strip.local_slopes))(*exact)
    found = MAKERS[backend](strip)(q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    (expected * weight).sum().backward()
    (found.double() * weight).sum().backward()
    for x, y in zip((q, k, v), exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("length", [1024, 4096, 16384])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES)
def test_rows_are_within_the_limit(backend: str, length: int, dtype: torch.dtype, tolerance: float) -> None:
    cuda = torch.device("cuda")
    for heads in (16, 112):
        found = audit(backend, heads=heads, head_dim=128, length=length, dtype=dtype, device=cuda)
        assert found.worst.measured.worst <= TOLERANCE[dtype], tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_demo_trains_and_evaluates_on_one_gpu(tmp_path: Path, precision: str) -> None:
    run_dir = tmp_path / "run"
    keys = [f"run.dir={run_dir}", "parallel.tensor=1", "parallel.pipeline=1", "train.steps=20"]
    overrides = [part for key in (*keys, f"train.precision={precision}") for part in ("--set", key)]
    for arguments in (["prepare", "demo", *overrides], ["train", "demo", "--ranks", "1", *overrides]):
        subprocess.run([sys.executable, "-P", "-m", "trainshort", *arguments], check=True)
    subprocess.run([sys.executable, "-P", "-m", "trainshort", "evaluate", str(run_dir)], check=True)
    assert (run_dir / "evaluation" / "report.json").is_file()
