"""Context and verdict of models whose use of context is planted."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.protocols import WindowProtocol
from tests.support.evaluation import measure, report_of, text_of
from tests.support.planted_models import VOCABULARY, PlantedModel
from training.evaluation.context import ContextPlan, plan_context, run_context
from training.evaluation.markdown import format_table
from training.evaluation.partial import PartialResults
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.plot import draw_plot
from training.evaluation.report import merge_reports
from training.evaluation.resampling import Units, units_of
from training.evaluation.results import Change, changes
from training.evaluation.sums import LossSums
from training.evaluation.usable import effective_context
from training.evaluation.verdict import verdict_of
from training.export.facts import facts_of_context

LONGEST = 512
TOKENS = 12_000


class NoParts(PartialResults):
    """Keeps nothing on disk."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def keep(self, sums: LossSums, progress: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        yield progress


def run_points(
    model: PlantedModel, text: np.ndarray, plan: ContextPlan, units: Units, **options: Any
) -> dict[str, Any]:
    begun = [LossSums(point.windows, units) for point in plan.points]
    return run_context(model, text, plan, begun=begun, units=units, parts=NoParts(), **options)


def context_of(model: PlantedModel, *, longest: int = LONGEST, text: np.ndarray | None = None) -> dict[str, Any]:
    text = model.text(TOKENS) if text is None else text
    plan, units = plan_context(len(text), longest=longest), units_of(None, tokens=len(text))
    seen: list[int] = []
    context = run_points(model, text, plan, units, batch_tokens=4096, progress=seen.append)
    assert sum(seen) == plan.inputs
    return context


def verdict_for(model: PlantedModel, *, lengths: tuple[int, ...], **context: Any) -> dict[str, Any]:
    text = model.text(TOKENS)
    results = [measure(model, text, length=length, protocol="nonoverlapping") for length in lengths]
    return dict(verdict_of({**report_of(*results, of=text_of(TOKENS)), **context}))


@pytest.mark.parametrize("longest", [1, 7, 100, 512])
def test_every_context_scores_the_same_tokens(longest: int) -> None:
    plan = plan_context(1000, longest=longest)
    scored = {tuple(np.flatnonzero(point.windows.scored_in(np.arange(1000))).tolist()) for point in plan.points}
    assert len(scored) == 1
    section = max(1, longest // 8)
    for point in plan.points:
        windows = point.windows
        assert windows.starts.min() >= 0
        assert (windows.starts + windows.length).max() <= 999
        in_order = windows.scored_from + 1 - point.shuffled
        assert in_order.min() == point.context
        most = (windows.scored_to - point.shuffled).max()
        assert most < point.context + max(1, longest // 32 if point in plan.shuffled else point.context // 4)
    assert plan.cut[-1].windows.length == longest
    assert plan.cut[-1].context == longest - section + 1
    assert all(one.context < other.context for one, other in pairwise(plan.cut))
    assert [point.context for point in plan.shuffled] == {100: [16, 32, 64, 89], 512: [16, 32, 64, 128, 256, 449]}.get(
        longest, []
    )


@pytest.mark.parametrize("distance", [1, 2, 32, 48, 256])
def test_a_model_that_copies_has_its_distance(distance: int) -> None:
    model = PlantedModel(distance)
    context = context_of(model)
    assert context["effective_context"] == distance
    assert context["effective_context_interval"] == [distance, distance]
    curve = dict(zip(context["contexts"], context["loss"], strict=True))
    uniform, full = math.log(VOCABULARY), context["loss"][-1]
    assert full < 1
    for seen, loss in curve.items():
        # a prediction sees at most a quarter more
        if seen >= distance:
            assert loss == pytest.approx(full, abs=1e-9)
        elif 1.25 * seen < distance:
            assert loss == pytest.approx(uniform, abs=1e-6)
        else:
            assert loss > full + 0.1
    for seen, loss in zip(context["shuffled_contexts"], context["shuffled_loss"], strict=True):
        if seen >= distance:
            assert loss == pytest.approx(full, abs=1e-9)
        elif 2 * seen < distance:
            assert loss > full + 2, "what it copies from is elsewhere"


def test_a_mean_of_the_context_does_not_see_its_order() -> None:
    class Counting(PlantedModel):
        """Its loss falls with the even tokens that it sees, wherever they are."""

        def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
            losses = 3 - torch.log1p((tokens[:, :-1] % 2 == 0).double().cumsum(1)) / 10
            return losses if last is None else losses[:, -last:]

    context = context_of(Counting(1))
    assert context["effective_context"] > 256
    *shuffled, in_order = context["shuffled_loss"]
    assert shuffled == pytest.approx([in_order] * len(shuffled), abs=1e-12)


def test_the_best_context_counts_not_a_longest_that_harms() -> None:
    context = context_of(PlantedModel(32, harmed_beyond=200))
    assert context["effective_context"] == 32
    assert context["loss"][-1] > min(context["loss"]) + 0.9
    assert effective_context([1, 2, 4, 8], [3.0, 2.011, 2.0, 2.5]) == 4
    assert effective_context([1, 2, 4, 8], [3.0, 2.009, 2.0, 2.5]) == 2


def test_orders_do_not_depend_on_the_size_of_a_batch() -> None:
    model = PlantedModel(64)
    text = model.text(2000)
    plan, units = plan_context(2000, longest=128), units_of(None, tokens=2000)
    one, other = (
        run_points(model, text, plan, units, batch_tokens=batch, progress=lambda _: None) for batch in (300, 100_000)
    )
    assert one["shuffled_loss"] == pytest.approx(other["shuffled_loss"], abs=1e-12)


def test_a_verdict_says_what_was_planted() -> None:
    model = PlantedModel(8, harmed_beyond=128)
    context = {"context": context_of(model, longest=256)}
    verdict = verdict_for(model, lengths=(32, 64, 128, 256), **context)
    assert (verdict["usable_length"], verdict["effective_context"]) == (128, 8)
    assert verdict["usable_length_interval"] == [128, 128]
    usable, effective, shuffled, first, last = verdict["words"]
    assert usable.startswith(
        "usable length: 128 tokens (128 in 95 % of the draws), within 1 % of the best perplexity, "
    )
    assert "at 128; at 256 perplexity is " in usable
    assert effective.startswith("effective context: 8 tokens (8 in 95 % of the draws): with no more, ")
    none = verdict_for(PlantedModel(1), lengths=(32,), context=context_of(PlantedModel(1), longest=64))
    assert any(words.startswith("effective context: 1 token (1 in 95 % of the draws)") for words in none["words"])
    assert facts_of_context(1).startswith("Effective context: 1 token; ")
    assert shuffled.startswith("with the tokens beyond the nearest 16 shuffled, perplexity changes by +0.00%")
    # of a window's predictions, the first seven see less than eight tokens
    assert [each["length"] for each in verdict["early_tokens"]] == [32, 64, 128, 256]
    assert verdict["early_tokens"][0]["share"] == pytest.approx(7 / 32)
    assert first.startswith("early tokens: at 32, 21.9% of the predictions see less than the effective context")
    assert "at 256, 2.7%" in last
    assert verdict["not_tested"] == [
        "lengths over 256 tokens",
        "other texts than held-out",
        "whether single facts far back are found: perplexity does not show it",
    ]


def test_early_tokens_cost_what_late_ones_do_not() -> None:
    model = PlantedModel(16)
    verdict = verdict_for(model, lengths=(64, 512), context=context_of(model))
    whole = measure(model, model.text(TOKENS), length=64, protocol="nonoverlapping").loss
    late = measure(model, model.text(TOKENS), length=64, protocol="last:49").loss
    assert verdict["early_tokens"][0]["share"] == pytest.approx(15 / 64)
    assert verdict["early_tokens"][0]["loss"] == pytest.approx(whole - late, abs=1e-6)
    assert verdict["early_tokens"][1]["loss"] < 0.2 * verdict["early_tokens"][0]["loss"]


def test_an_uncertain_length_has_an_interval() -> None:
    """Two lengths as good as each other: half of the draws prefer either."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 200)
    results = [
        PerplexityResult(length, WindowProtocol(stride=None), 9000, loss, draws=tuple(loss + draw))
        for length, loss, draw in ((64, 2.0, 0 * noise), (128, 2.009, noise), (256, 2.3, noise))
    ]
    report, error, approx = report_of(*results), noise.std(ddof=1), partial(pytest.approx, rel=1e-3)
    verdict = report["verdict"]
    assert (verdict["usable_length"], verdict["usable_length_interval"]) == (128, [64, 128])
    assert "128 tokens (64 to 128 in 95 % of the draws)" in verdict["words"][0]
    assert results[1].standard_error == pytest.approx(noise.std(ddof=1))
    first, second, third = (change for _, change in changes(report["results"]))
    assert first is None
    assert (second, third) == (Change(approx(0.009), approx(error)), Change(approx(0.3), approx(error)))
    assert f"| +0.3000 ± {error:.4f} |" in format_table(report, plot="x.png")


def test_a_verdict_without_figures_says_so() -> None:
    sliding = report_of(PerplexityResult(80, WindowProtocol(stride=16), 976, 1.5))
    assert sliding["verdict"]["usable_length"] is None
    assert sliding["verdict"]["words"] == []
    assert sliding["verdict"]["not_tested"][:2] == [
        "the usable length: no length was measured with the protocol nonoverlapping",
        "the effective context: evaluate with --context",
    ]
    bare = report_of(PerplexityResult(80, WindowProtocol(stride=None), 976, 1.5))
    assert (bare["verdict"]["usable_length"], bare["verdict"]["usable_length_interval"]) == (80, None)


def test_what_was_measured_of_the_context_is_kept(tmp_path: Path) -> None:
    model = PlantedModel(32)
    whole = PerplexityResult(64, WindowProtocol(stride=None), 900, 2.0)
    first = report_of(whole, date="2026-01-01T00:00:00Z", command="first", context=context_of(model))
    merged = merge_reports(first, report_of(whole, date="2026-01-02T00:00:00Z", command="second"))
    assert merged is not None
    assert merged["context"] == {**context_of(model), "date": "2026-01-01T00:00:00Z"}
    assert merged["verdict"]["effective_context"] == 32
    assert [each["command"] for each in merged["earlier"]] == ["first"]
    table = format_table(merged, plot="held-out.png")
    assert "- effective context: 32 tokens (32 in 95 % of the draws)" in table
    assert "| 449 | " in table
    wide, narrow = (draw_plot(report, tmp_path / f"{number}.png") for number, report in enumerate((merged, first)))
    assert wide.stat().st_size > 10_000
    assert narrow.stat().st_size > 10_000
