"""What only a GPU can show: `make test-gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.model.alibi import slopes
from training.model.attention import BiasStrip, reference, sdpa

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [64, 192, 1001, 1024, 2112])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_sdpa_equals_the_reference_with_gradients(length: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    strip = BiasStrip(torch.tensor(slopes(16)))
    strip.block(queries=1, keys=4096, like=torch.zeros(1, device="cuda"))  # longer than the call needs
    exact = [torch.randn(1, 16, length, 128, device="cuda", dtype=dtype).double().requires_grad_() for _ in range(3)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    weight = torch.randn(1, 16, length, 128, device="cuda", dtype=torch.float64)
    expected = reference(BiasStrip(strip.slopes))(*exact)
    found = sdpa(strip)(q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    (expected * weight).sum().backward()
    (found.double() * weight).sum().backward()
    for x, y in zip((q, k, v), exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_demo_trains_and_evaluates_on_one_gpu(tmp_path: Path, precision: str) -> None:
    run_dir = tmp_path / "run"
    keys = [f"run.dir={run_dir}", "parallel.tensor=1", "parallel.pipeline=1", "train.steps=20"]
    overrides = [part for key in (*keys, f"train.precision={precision}") for part in ("--set", key)]
    for arguments in (["prepare", "demo", *overrides], ["train", "demo", "--ranks", "1", *overrides]):
        subprocess.run([sys.executable, "-P", "-m", "trainshort", *arguments], check=True)
    subprocess.run([sys.executable, "-P", "-m", "trainshort", "evaluate", str(run_dir)], check=True)
    assert (run_dir / "evaluation" / "report.json").is_file()
