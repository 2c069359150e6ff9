"""FlexAttention, compiled on a CPU by a C++ compiler: it has a forward pass only there."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from configs.positions import slopes
from parallel.documents import Documents
from training.model.kernels.flex import Flex, flex_kernel
from training.model.kernels.reference import Reference
from training.model.kernels.tiles import TILE, tiles_with_weight
from training.model.positions.alibi import slope_formula
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows

HEADS = 3
LENGTHS = (1, 64, 127, 128, 129, 200, 256, 300, 384, 511, 640, 1025, 1921, 2304)  # with windows from 16 tiles on


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compilation_serves_many_lengths() -> None:
    bias = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64), slope_of=slope_formula(HEADS, first=0))
    bias.lossless = LosslessWindows()
    attend, generator = Flex(bias, compiled=True), torch.Generator().manual_seed(0)
    counters.clear()
    for length in LENGTHS:
        q, k, v = torch.randn(3, 2 + length % 3, HEADS, length, 16, generator=generator)
        torch.testing.assert_close(attend(q, k, v), Reference(bias)(q, k, v), atol=1e-5, rtol=0)
    after_a_cache = q[:, :, -10:]
    torch.testing.assert_close(attend(after_a_cache, k, v), Reference(bias)(after_a_cache, k, v), atol=1e-5, rtol=0)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "its first length, or a batch of 1, is no kind of its own"
    *short, first, second, cached = bias.lossless.take()
    assert all(density == 1 for density in short)
    assert cached < second < first < 0.7


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_trace_serves_many_batches_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []

    def traced(graph: torch.fx.GraphModule, _: object) -> Any:
        sources.append(torch.compiler.config.dynamic_sources)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=traced))
    flex_kernel.cache_clear()
    bias = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64), slope_of=slope_formula(HEADS, first=0))
    attend, generator = Flex(bias, compiled=True), torch.Generator().manual_seed(0)
    try:
        for batch, length in ((2, 200), (2, 300), (5, 511), (3, 511)):
            attend(*torch.randn(3, batch, HEADS, length, 16, generator=generator))
        (names,) = sources
        assert ":" not in names, "torch 2.11 knows no dimension of a source"
    finally:
        flex_kernel.cache_clear()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_documents_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its kernels take long on a CPU
    flex_kernel.cache_clear()
    bias = SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64), slope_of=slope_formula(HEADS, first=0))
    attend, generator = Flex(bias, compiled=True), torch.Generator().manual_seed(0)
    counters.clear()
    try:
        for seed in range(4):
            q, k, v = torch.randn(3, 2, HEADS, 300, 16, generator=generator)
            begins = torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) < 0.02
            documents = Documents(begins, device=q.device)
            expected = Reference(bias)(q, k, v, documents)
            torch.testing.assert_close(attend(q, k, v, documents), expected, atol=1e-5, rtol=0)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        flex_kernel.cache_clear()


@torch.no_grad()
def test_one_trace_finds_the_tiles_of_all_lengths() -> None:
    local = torch.tensor(slopes(HEADS), dtype=torch.float32)
    traced = torch.compile(tiles_with_weight, fullgraph=True, backend="eager")  # its kernels take long on a CPU
    counters.clear()
    for tiles in (16, 33, 20):
        q, k = torch.randn(2, 2, HEADS, tiles, TILE, 16, generator=torch.Generator().manual_seed(tiles))
        for x in (q, k):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        found, expected = (find(q, k, local, None) for find in (traced, tiles_with_weight))
        assert all(map(torch.equal, found, expected))
    assert counters["stats"]["unique_graphs"] == 1
