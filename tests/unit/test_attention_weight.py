"""The share of attention's weight on the nearest keys, against a closed form and against weights read from a kernel."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.positions import POSITIONS
from configs.protocols import WindowProtocol
from tests.support.evaluation import report_of
from tests.support.models import VOCABULARY, make_decoder
from training.evaluation.attention_weight import measure_weights, weight_within
from training.evaluation.markdown import format_table
from training.evaluation.perplexity import PerplexityResult
from training.model.observed import observed_attention
from training.model.positions.bias import SlopeBias
from training.model.proof.attention_weights import read_rows
from training.model.single import SingleModel

LONGEST, TOKENS = 90, 400


def test_equal_scores_have_the_closed_form_of_alibi() -> None:
    slopes = torch.tensor([0.5, 0.0625], dtype=torch.float64)
    q, k = torch.zeros(2, 2, 3, 8), torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    shares = weight_within(q, k, bias=SlopeBias(slopes), nearest=[1, 16, 40])
    for head, slope in enumerate(slopes.tolist()):
        ratio = math.exp(-slope)
        for place, nearest in enumerate((1, 16, 40)):
            seen = (38, 39, 40)  # keys of the last three queries
            expected = [(1 - ratio ** min(nearest, keys)) / (1 - ratio**keys) for keys in seen]
            assert float(shares[head, place]) == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize(("position", "window"), [*((position, None) for position in POSITIONS), ("alibi", 20)])
def test_shares_are_those_of_weights_read_from_the_kernel(position: str, window: int | None) -> None:
    model = SingleModel(make_decoder(4, position=position, window=window), device=torch.device("cpu"), certificate={})
    text = torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2)).numpy()
    weights = measure_weights(model, model.blocks, text, longest=LONGEST)
    assert (weights["nearest"], weights["queries"]) == ([16, 32, 64, 90], 64)
    rows: dict[int, list[Tensor]] = {0: [], 1: []}
    kernels = [block.attend for block in model.blocks]

    def see(layer: int, q: Tensor, k: Tensor) -> None:
        rows[layer].append(read_rows(kernels[layer], q, k)[:, -16:])

    with observed_attention(model.blocks, see):
        for start in (0, 103, 206, 309):
            model.losses(torch.from_numpy(text[start : start + LONGEST + 1])[None])
    for layer, read in rows.items():
        for head in range(4):
            for place, nearest in enumerate(weights["nearest"]):
                near = [
                    float(row[max(0, query - nearest + 1) : query + 1].sum())
                    for window_rows in read
                    for query, row in enumerate(window_rows[head], LONGEST - 16)
                ]
                share = weights["share_by_layer_and_head"][layer][head][place]
                assert share == pytest.approx(np.mean(near), abs=1e-5)
    assert [block.attend for block in model.blocks] == kernels
    if window is not None:
        assert min(head[1] for layer in weights["share_by_layer_and_head"] for head in layer) == pytest.approx(1)


def test_the_report_has_a_row_per_layer_and_per_head() -> None:
    context = {
        "longest": 64, "tokens": 100, "contexts": [1, 57], "loss": [3.0, 2.0], "error_from_longest": [0.1, 0.0],
        "shuffled_contexts": [57], "shuffled_loss": [2.0], "effective_context": 57,
        "effective_context_interval": [57, 57],
    }  # fmt: skip
    report = report_of(PerplexityResult(64, WindowProtocol(stride=None), 900, 2.0), context=context)
    shares = [[[0.5, 1.0], [0.25, 1.0]], [[0.75, 1.0], [0.125, 1.0]]]
    weights = {"nearest": [16, 1024], "queries": 64, "share_by_layer_and_head": shares}
    report["context"]["attention"] = weights
    text = format_table(report, plot="x.png")
    assert "| nearest keys | 16 | 1,024 |\n|---|---:|---:|\n| layer 0 | 37.5% (25.0%) | 100.0% (100.0%) |\n" in text
    assert "| layer 1 | 43.8% (12.5%) |" in text
    assert "| head 0 | 62.5% (50.0%) |" in text
    assert "| head 1 | 18.8% (12.5%) |" in text
    del report["context"]["attention"]  # of a report of an earlier version
    assert "nearest keys" not in format_table(report, plot="x.png")
