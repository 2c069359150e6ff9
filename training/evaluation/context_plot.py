"""Draw the perplexity of the same tokens against the context that they see."""

import math
from typing import Any

from matplotlib.axes import Axes

from training.evaluation.chart import draw_curve, head_axes, mark_training_length, scale_axes


def draw_context(axes: Axes, context: dict[str, Any]) -> None:
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
