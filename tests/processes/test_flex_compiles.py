"""FlexAttention, compiled on a CPU by a C++ compiler: it has a forward pass only there."""

import pytest
import torch
from torch._dynamo.utils import counters

from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.positions.alibi import slope_formula, slopes
from training.model.positions.bias import SlopeBias

HEADS = 3
LENGTHS = (1, 64, 127, 128, 129, 200, 256, 300, 384, 511, 640, 1025)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compilation_serves_many_lengths() -> None:
    bias = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64), slope_of=slope_formula(HEADS, first=0))
    attend, generator = Flex(bias, compiled=True), torch.Generator().manual_seed(0)
    counters.clear()
    for length in LENGTHS:
        q, k, v = torch.randn(3, 2, HEADS, length, 16, generator=generator)
        torch.testing.assert_close(attend(q, k, v), Reference(bias)(q, k, v), atol=1e-5, rtol=0)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
