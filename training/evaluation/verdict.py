"""The verdict of a report: usable length, effective context, and what was not tested. Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from configs.figures import counted
from training.evaluation.resampling import interval
from training.evaluation.results import is_whole
from training.evaluation.usable import lengths_near_best, usable_length, whole_windows

Report = Mapping[str, Any]


def measured_context(report: Report) -> int | None:
    """Return the effective context that a report of any version holds; None if it was not measured."""
    value = (report.get("verdict") or {}).get("effective_context")
    return None if value is None else int(value)


def verdict_of(report: Report) -> dict[str, Any]:
    """Return the verdict of a report.

    Returns:
        usable_length, the longest within 1 % of the best perplexity; None if nothing without overlap was measured.
        usable_length_interval, its range in 95 % of the draws; None if they are not known.
        scaled, the same two for each scale that was measured, with its name as scale.
        effective_context and effective_context_interval; None if the context was not measured.
        early_tokens, what predictions with less than that cost at each length.
        words, all of it in sentences. not_tested, what it says nothing about.
    """
    whole, context = whole_windows(report), report.get("context") or {}
    effective = context.get("effective_context")
    early = [] if effective is None else [*_early_tokens(whole, effective)]
    usable, scaled = _usable(report), [_usable(report, scale=scale) for scale in _scales(report)]
    verdict = {
        **usable,
        "scaled": scaled,
        "effective_context": effective,
        "effective_context_interval": context.get("effective_context_interval"),
        "early_tokens": early,
    }
    of_lengths = [words for each in (usable, *scaled) for words in _usable_words(report, each)]
    words = [*of_lengths, *_context_words(context), *_early_words(early)]
    return {**verdict, "words": words, "not_tested": [*_not_tested(report, whole, context)]}


def _scales(report: Report) -> list[str]:
    """Return the scales with which windows that do not overlap were measured."""
    return sorted(
        {str(each["scale"]) for each in report["results"] if "scale" in each and is_whole(each, scale=each["scale"])}
    )


def _usable(report: Report, *, scale: str | None = None) -> dict[str, Any]:
    """Return usable length and interval with a scale, which is named, or without."""
    whole = whole_windows(report, scale=scale)
    return {
        **({} if scale is None else {"scale": scale}),
        "usable_length": usable_length(report, scale=scale) if whole else None,
        "usable_length_interval": _usable_interval(report, whole, scale=scale),
    }


def _usable_interval(report: Report, whole: Sequence[Report], *, scale: str | None) -> list[int] | None:
    """Return the range of the usable length in 95 % of the draws of the text's units."""
    if not whole or len({len(result.get("draws", ())) for result in whole}) != 1 or not whole[0].get("draws"):
        return None
    drawn = np.exp([result["draws"] for result in whole])  # [results, draws]
    lengths = []
    for draw in drawn.T.tolist():
        results = [{**each, "perplexity": perplexity} for each, perplexity in zip(whole, draw, strict=True)]
        lengths.append(usable_length({**report, "results": results}, scale=scale))
    return [int(end) for end in interval(np.array(lengths))]


def _early_tokens(whole: Sequence[Report], effective: int) -> Iterator[dict[str, float]]:
    """Yield what predictions that see fewer tokens than the effective context cost, for each length beyond it.

    Source: Press et al. 2022, appendix B: the early token curse.
    """
    for result in whole:
        bins = result.get("loss_by_position")
        if bins is None or result["length"] <= effective:
            continue
        tokens, losses = np.array(bins["tokens"]), np.array(bins["loss"])
        late = np.array(bins["last"]) >= effective
        share = 1 - tokens[late].sum() / tokens.sum()
        excess = result["loss"] - float(tokens[late] @ losses[late] / tokens[late].sum())
        yield {"length": result["length"], "share": float(share), "loss": excess}


def _usable_words(report: Report, verdict: Report) -> Iterator[str]:
    """Yield the usable length with a scale or without in words, if it was measured."""
    scale = verdict.get("scale")
    whole = whole_windows(report, scale=scale)
    if not whole:
        return
    usable, longest = verdict["usable_length"], whole[-1]["length"]
    best = min(whole, key=lambda result: float(result["perplexity"]))
    within = "" if verdict["usable_length_interval"] is None else f" ({_range(verdict['usable_length_interval'])})"
    scaled = "" if scale is None else f" with --scale {scale}"
    near = f"within 1 % of the best perplexity, {best['perplexity']:,.2f} at {best['length']:,}"
    is_near = usable in lengths_near_best(whole)
    reasons = [near if is_near else f"the training length: no measured length from it on is {near}"]
    if usable < longest:
        beyond = next(result for result in whole if result["length"] > usable)
        worse = beyond["perplexity"] / best["perplexity"] - 1
        reasons.append(f"at {beyond['length']:,} perplexity is {worse:.1%} above the best")
    elif is_near:
        reasons.append("no longer text was measured" if longest > report["train_length"] else "the training length")
    yield f"usable length{scaled}: {usable:,} tokens{within}, {'; '.join(reasons)}"


def _context_words(context: Report) -> Iterator[str]:
    if not context:
        return
    effective = context["effective_context"]
    full, best = context["loss"][-1], min(context["loss"])
    interval_words = _range(context["effective_context_interval"])
    yield (
        f"effective context: {counted(effective, 'token')} ({interval_words}): with no more, {context['tokens']:,} "
        f"tokens have a perplexity within 1 % of the best, {math.exp(best):,.2f}; with up to {context['longest']:,} it "
        f"is {math.exp(full):,.2f}"
    )
    shuffled = dict(zip(context["shuffled_contexts"], context["shuffled_loss"], strict=True))
    beyond = [each for each in shuffled if each >= effective][:-1]  # in the last one nothing is shuffled
    if beyond:
        changed = math.expm1(shuffled[beyond[0]] - context["shuffled_loss"][-1])
        yield f"with the tokens beyond the nearest {beyond[0]:,} shuffled, perplexity changes by {changed:+.2%}"


def _early_words(early: Sequence[Report]) -> Iterator[str]:
    for each in (early[0], early[-1]) if len(early) > 1 else early:
        yield (
            f"early tokens: at {each['length']:,}, {each['share']:.1%} of the predictions see less than the effective "
            f"context, which costs {math.expm1(each['loss']):.2%} of perplexity"
        )


def _not_tested(report: Report, whole: Sequence[Report], context: Report) -> Iterator[str]:
    if whole:
        yield f"lengths over {whole[-1]['length']:,} tokens"
    else:
        without = " without --scale" if _scales(report) else ""
        yield f"the usable length: no length was measured with the protocol nonoverlapping{without}"
    if not context:
        yield "the effective context: evaluate with --context"
    yield f"other texts than {report['data']['name']}"
    yield "whether single facts far back are found: perplexity does not show it"


def _range(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low:,} in 95 % of the draws" if low == high else f"{low:,} to {high:,} in 95 % of the draws"
