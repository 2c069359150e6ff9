"""Draw the perplexity of one checkpoint against length, and against the context that the same tokens see."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from configs.terminal import printable
from training.evaluation.chart import (
    GREY,
    TEXT_BOX,
    add_legend,
    draw_curve,
    head_axes,
    line_style,
    mark_training_length,
    new_figure,
    save_figure,
    scale_axes,
    shorten,
    write_above,
)
from training.evaluation.kept import other_precision
from training.evaluation.results import changes, result_key, with_scale

# Draw the unigram baseline up to this multiple of the highest perplexity; a higher one would flatten the curves.
_BASELINE_RATIO = 1.5
_MOST_WITHIN = 5  # lines whose names stand within the axes; more names would lie over the lines
# characters of the text's name that fit into the title
_LONGEST_NAME = 44


def draw_plot(report: dict[str, Any], path: Path) -> Path:
    """Draw perplexity against length as a PNG, and against context if that was measured; return its path.

    Args:
        report: The contents of report.json.
        path: The PNG; an existing file is replaced whole.
    """
    context = report.get("context")
    figure = new_figure(inches=(7.2 if context is None else 13.2, 4.4))
    axes = figure.add_subplot(1, 1 if context is None else 2, 1)
    _draw_lengths(axes, report)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > _MOST_WITHIN:
        add_legend(figure, dict(zip(labels, handles, strict=True)), columns=3)
    if context is not None:
        _draw_context(figure.add_subplot(1, 2, 2), context)
    return save_figure(figure, path)


def _draw_context(axes: Axes, context: dict[str, Any]) -> None:
    """Draw both curves, the context cut and the rest of it shuffled, and mark the effective context.

    Args:
        axes: Where to draw.
        context: The report's `context`.
    """
    names = {"contexts": "loss", "shuffled_contexts": "shuffled_loss"}
    curves = [
        [(each, math.exp(loss)) for each, loss in zip(context[key], context[losses], strict=True)]
        for key, losses in names.items()
    ]
    for number, (points, label) in enumerate(zip(curves, ("no more context", "the rest shuffled"), strict=True)):
        if points:
            draw_curve(axes, points, label=label, number=number)
    points = [point for curve in curves for point in curve]
    effective = context["effective_context"]
    scale_axes(
        axes,
        lengths={each for each, _ in points},
        perplexities=[perplexity for _, perplexity in points],
        keep=[effective],
    )
    mark_training_length(axes, effective, text=f"effective context {effective:,}")
    axes.set_xlabel("tokens of context, in order")
    axes.set_ylabel("perplexity per token")
    facts = f"the same {context['tokens']:,} tokens · windows of up to {context['longest']:,}"
    head_axes(axes, heading="Perplexity against context", facts=facts)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    """Draw perplexity against length, a line per protocol."""
    lines, train_length = _lines(report), report["train_length"]
    points = [point for line in lines.values() for point in line]
    for number, (label, line) in enumerate(lines.items()):
        draw_curve(axes, line, label=label, number=number)
    _draw_intervals(axes, report, [*lines])
    scale_axes(
        axes,
        lengths={length for length, _ in points},
        perplexities=[perplexity for _, perplexity in points],
        keep=[train_length],
    )
    mark_training_length(axes, train_length, text=f"training length {train_length:,}")
    _annotate(axes, report, lines)
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel("perplexity per token")
    head_axes(axes, heading="Perplexity against length", facts=" · ".join(_facts(report, lines)))
    if 1 < len(lines) <= _MOST_WITHIN:
        axes.legend(frameon=False, fontsize=9, loc="best")


def _lines(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in report["results"]:
        lines.setdefault(_label(result), []).append((result["length"], result["perplexity"]))
    return lines


def _label(result: dict[str, Any]) -> str:
    (_, number, _), name = result_key(result), result["protocol"]
    label = {"sliding": f"sliding, stride {number}", "last": f"last {number} of a window"}.get(name, name)
    return f"{label}{with_scale(result)}"


def _draw_intervals(axes: Axes, report: dict[str, Any], labels: Sequence[str]) -> None:
    """Draw how sure the difference of each perplexity from the line's first one is: its interval of 95 %.

    How hard the text is, which is the larger part of a standard error, is in both.
    """
    for result, change in changes(report["results"]):
        if change is not None:
            low, high = (result["perplexity"] * math.exp(sign * 1.96 * change.error) for sign in (-1, 1))
            colour = line_style(labels.index(_label(result)))["color"]
            axes.vlines(result["length"], low, high, color=colour, linewidth=1.2, alpha=0.7, zorder=2)


def _annotate(axes: Axes, report: dict[str, Any], lines: dict[str, list[tuple[int, float]]]) -> None:
    """Draw the unigram model's perplexity, and write the value at each point of a single line."""
    unigram = report["unigram_perplexity"]
    if unigram is not None and unigram <= _BASELINE_RATIO * max(result["perplexity"] for result in report["results"]):
        axes.axhline(unigram, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            f"unigram model {unigram:,.1f}",
            xy=(1, unigram),
            xycoords=("axes fraction", "data"),
            xytext=(-5, 4),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=9,
        )
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, unigram / 1.1), max(top, unigram * 1.15))
    if len(lines) == 1:
        (points,) = lines.values()
        for length, perplexity in points if len(points) <= 8 else ():
            text = f"{perplexity:,.2f}" if perplexity < 100 else f"{perplexity:,.0f}"
            write_above(axes, text, point=(length, perplexity), bbox=TEXT_BOX)


def _facts(report: dict[str, Any], lines: dict[str, list[tuple[int, float]]]) -> list[str]:
    unigram, name = report["unigram_perplexity"], printable(str(report["data"]["name"]))
    facts = [f"{report['position']} positions", f"step {report['step']:,}", shorten(name, characters=_LONGEST_NAME)]
    facts += filter(None, [other_precision(report)])
    if unigram is not None:
        facts.append(f"unigram model: {unigram:,.1f}")
    if len(lines) == 1:  # otherwise the legend names them
        facts.extend(lines)
    return facts
