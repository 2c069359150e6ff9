"""Lossless and sliding windows in the kernels of a GPU, against all keys in fp64."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from configs.backends import BACKENDS, installed_packages, unavailable, unsupported
from configs.positions import slopes
from training.model.attention import make_attention
from training.model.kernels.next_token import FEWEST_KEYS, Parts, takes_parts
from training.model.kernels.reference import Reference
from training.model.positions.alibi import slope_formula
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows, norms

pytestmark = pytest.mark.gpu
CUDA, HEADS, HEAD_DIM = torch.device("cuda"), 6, 128
CASES = [
    (name, dtype, tolerance)
    for name, backend in BACKENDS.items()
    for precision, dtype, tolerance in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 3e-2))
    if "cuda" in backend.leaves_out_on
    and unsupported(backend, position="alibi", precision=precision, head_dim=HEAD_DIM) is None
    and unavailable(backend, device="cuda", packages=installed_packages()) is None
]
# A kernel in fp32 takes Triton most of a minute.
CORE = [pytest.param(*case, marks=[pytest.mark.slow] if case[1] == torch.float32 else []) for case in CASES]


def alibi(window: int | None = None) -> SlopeBias:
    bias = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64), slope_of=slope_formula(HEADS, first=0))
    bias.window = window
    return bias


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v; the keys of one head have an outlier, as attention sinks have, and some queries are zero."""
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 2, HEADS, length, HEAD_DIM, device=CUDA)
    k[:, 2, 0] *= 20
    q[:, 1, 300:500] = 0
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CORE)
@pytest.mark.parametrize(
    ("window", "by_scores"), [(None, False), (None, True), pytest.param(300, True, marks=pytest.mark.slow)]
)
def test_windows_change_neither_output_nor_gradients(
    backend: str, dtype: torch.dtype, tolerance: float, window: int | None, by_scores: bool
) -> None:
    bias = alibi(window)
    bias.lossless = LosslessWindows(by_scores=by_scores)
    attend = make_attention(backend, bias)
    counters.clear()
    for length in (2048, 4001, 2500):
        given = inputs(length, dtype)
        exact = [x.detach().double().requires_grad_() for x in given]
        with torch.no_grad():
            found, expected = attend(*given), Reference(alibi(window))(*exact)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    # the kernel at its first length, then at any, and the tiles
    assert counters["stats"]["unique_graphs"] <= 4
    weight = torch.randn(given[0].shape, device=CUDA, dtype=torch.float64)
    ours = torch.autograd.grad((attend(*given).double() * weight).sum(), given)
    theirs = torch.autograd.grad((Reference(alibi(window))(*exact) * weight).sum(), exact)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, atol=10 * tolerance, rtol=10 * tolerance)
    densities = bias.lossless.take()
    assert len(densities) == 4
    assert all(density < 0.8 for density in densities)


@pytest.mark.parametrize(("backend", "dtype"), [pytest.param(*case.values[:2], marks=case.marks) for case in CORE])
@pytest.mark.parametrize("by_scores", [False, True])
def test_windows_are_found_without_waiting_for_the_gpu(backend: str, dtype: torch.dtype, by_scores: bool) -> None:
    bias = alibi()
    bias.lossless = LosslessWindows(by_scores=by_scores)
    attend, given = make_attention(backend, bias), inputs(2048, dtype)
    gradient = torch.ones_like(given[0])
    for _ in range(2):
        torch.autograd.grad(attend(*given), given, gradient)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attend(*given), given, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(density < 1 for density in bias.lossless.take())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("window", [None, 300])
@torch.no_grad()
def test_the_next_token_reads_what_it_needs(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    q, k, v = (x.detach().contiguous() for x in inputs(FEWEST_KEYS, dtype))
    k[:, :, FEWEST_KEYS - 2] *= 3  # the largest of its head, but for the outlier's
    assert takes_parts(alibi(), k)
    attend = Parts(alibi(window), k)
    raised = norms(k[:, :, : FEWEST_KEYS - 3]).amax(2, keepdim=True)
    for own in (0, 200, FEWEST_KEYS - 3, FEWEST_KEYS - 2, FEWEST_KEYS - 1):
        exact = Reference(alibi(window))(*(x[:, :, : own + 1].double() for x in (q, k, v)))[:, :, -1:]
        for radius in (None, raised) if window is None else (None,):
            position = torch.tensor([own], device=CUDA)
            out = attend(q[:, :, own : own + 1], k, v, position=position, radius=radius)
            torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    if window is None:
        torch.testing.assert_close(raised, norms(k).amax(2, keepdim=True))
