"""Draw perplexity against length."""

import secrets
import warnings
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from configs.files import whole_file
from configs.terminal import printable

# The palette of Okabe and Ito, safe for colour-blind readers. The markers distinguish the lines in greyscale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#555555"
# a background for text, so that it stays readable across a line
_TEXT_BOX = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
# Draw the unigram baseline up to this multiple of the highest perplexity; a higher one would flatten the curves.
_BASELINE_RATIO = 1.5
# make the axis logarithmic from this ratio of the highest perplexity to the lowest
_LOGARITHMIC_RATIO = 6.0
# characters of the text's name that fit into the title
_LONGEST_NAME = 44


def draw_plot(report: dict[str, Any], path: Path) -> Path:
    """Draw perplexity against length as a PNG, one line per protocol; return its path.

    Args:
        report: The contents of report.json.
        path: The PNG; an existing file is replaced whole.
    """
    # The Agg canvas and the object interface need no display and share no state with a caller's pyplot.
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = _lines(report)
    for number, (label, points) in enumerate(lines.items()):
        lengths, perplexities = zip(*points, strict=True)
        axes.plot(
            lengths,
            perplexities,
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.8,
            markersize=5.5,
            zorder=3,
        )
    _set_scales(axes, report)
    _annotate(axes, report, lines)
    _label_axes(axes, report, several=len(lines) > 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary, warnings.catch_warnings():
        # A character that the font lacks, in the name of the text, is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png")
    return path


def _lines(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in report["results"]:
        sliding = result["protocol"] == "sliding"
        label = f"sliding, stride {result['stride']}" if sliding else "nonoverlapping"
        lines.setdefault(label, []).append((result["length"], result["perplexity"]))
    return {label: sorted(points) for label, points in lines.items()}


def _set_scales(axes: Axes, report: dict[str, Any]) -> None:
    lengths = sorted({result["length"] for result in report["results"]} | {report["train_length"]})
    values = [result["perplexity"] for result in report["results"]]
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 2**0.35, lengths[-1] * 2**0.35)
    axes.xaxis.set_major_locator(FixedLocator(_label_lengths(lengths, keep=report["train_length"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = min(values), max(values)
    if high / low >= _LOGARITHMIC_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / 1.3, high * 1.5)
        return
    # Show a range of at least a tenth of the value, so that a difference of a thousandth does not look like a cliff.
    margin = max(high - low, 0.1 * high)
    axes.set_ylim(low - 0.35 * margin, high + 0.45 * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))


def _label_lengths(lengths: list[int], *, keep: int) -> list[int]:
    """Return the lengths to label, far enough apart on a logarithmic axis that the labels do not overlap."""
    # The axis has room for about 14 labels.
    least = (lengths[-1] / lengths[0]) ** (1 / 14)
    chosen = [keep]
    for length in lengths:
        if all(max(length, other) / min(length, other) >= least for other in chosen):
            chosen.append(length)
    return sorted(chosen)


def _annotate(axes: Axes, report: dict[str, Any], lines: dict[str, list[tuple[int, float]]]) -> None:
    train_length = report["train_length"]
    axes.axvline(train_length, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.annotate(
        f"training length {train_length:,}",
        xy=(train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        color=_GREY,
        fontsize=9,
        bbox=_TEXT_BOX,
    )
    unigram = report["unigram_perplexity"]
    if unigram is not None and unigram <= _BASELINE_RATIO * max(result["perplexity"] for result in report["results"]):
        axes.axhline(unigram, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            f"unigram model {unigram:,.1f}",
            xy=(1, unigram),
            xycoords=("axes fraction", "data"),
            xytext=(-5, 4),
            textcoords="offset points",
            ha="right",
            color=_GREY,
            fontsize=9,
        )
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, unigram / 1.1), max(top, unigram * 1.15))
    if len(lines) == 1:
        (points,) = lines.values()
        for length, perplexity in points if len(points) <= 8 else ():
            axes.annotate(
                f"{perplexity:,.2f}" if perplexity < 100 else f"{perplexity:,.0f}",
                xy=(length, perplexity),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                bbox=_TEXT_BOX,
                zorder=2,
            )


def _label_axes(axes: Axes, report: dict[str, Any], *, several: bool) -> None:
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel("perplexity per token")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.annotate(
        "Perplexity against length",
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 22),
        textcoords="offset points",
        fontsize=12,
        fontweight="bold",
    )
    unigram, name = report["unigram_perplexity"], printable(str(report["data"]["name"]))
    facts = [
        f"{report['position']} positions",
        f"step {report['step']:,}",
        name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}...",
    ]
    if unigram is not None:
        facts.append(f"unigram model: {unigram:,.1f}")
    if not several:
        facts.extend(_lines(report))
    # A file name with two dollar signs is no formula.
    axes.set_title(" · ".join(facts), loc="left", fontsize=9, color=_GREY, parse_math=False)
    if several:
        axes.legend(frameon=False, fontsize=9, loc="best")
