"""The figure of perplexity against length."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from configs.files import whole_file

# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell the lines apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#555555"
# text stays readable where it crosses a line
_ON_WHITE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
# a baseline further off than this would press the curves flat
_BASELINE_FITS = 1.5
# from this ratio on, equal steps on the axis are equal ratios
_LOGARITHMIC_FROM = 6.0


def draw_plot(document: dict[str, Any], path: Path) -> Path:
    """Draw perplexity against length, one line per protocol, as a PNG; return its path.

    Args:
        document: The document of report.json.
        path: The PNG to write; it is replaced whole.
    """
    # the Agg canvas and the object interface: no display, and no state shared with a caller's pyplot
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = _lines(document)
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
    _scale(axes, document)
    _annotate(axes, document, lines)
    _describe(axes, document, several=len(lines) > 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _lines(document: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in document["results"]:
        sliding = result["protocol"] == "sliding"
        label = f"sliding, stride {result['stride']}" if sliding else "nonoverlapping"
        lines.setdefault(label, []).append((result["length"], result["perplexity"]))
    return {label: sorted(points) for label, points in lines.items()}


def _scale(axes: Axes, document: dict[str, Any]) -> None:
    lengths = sorted({result["length"] for result in document["results"]} | {document["train_length"]})
    values = [result["perplexity"] for result in document["results"]]
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 2**0.35, lengths[-1] * 2**0.35)
    axes.xaxis.set_major_locator(FixedLocator(_apart(lengths, keep=document["train_length"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = min(values), max(values)
    if high / low >= _LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / 1.3, high * 1.5)
        return
    # at least a tenth of the value in view: a difference of a thousandth should not look like a cliff
    margin = max(high - low, 0.1 * high)
    axes.set_ylim(low - 0.35 * margin, high + 0.45 * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))


def _apart(lengths: list[int], *, keep: int) -> list[int]:
    """Return the lengths whose labels do not run into each other on a logarithmic axis."""
    least = (lengths[-1] / lengths[0]) ** (1 / 14)
    chosen = [keep]
    for length in lengths:
        if all(max(length, other) / min(length, other) >= least for other in chosen):
            chosen.append(length)
    return sorted(chosen)


def _annotate(axes: Axes, document: dict[str, Any], lines: dict[str, list[tuple[int, float]]]) -> None:
    train_length = document["train_length"]
    axes.axvline(train_length, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.annotate(
        f"training length {train_length:,}",
        xy=(train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        color=_GREY,
        fontsize=9,
        bbox=_ON_WHITE,
    )
    unigram = document["unigram_perplexity"]
    if unigram is not None and unigram <= _BASELINE_FITS * max(result["perplexity"] for result in document["results"]):
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
                bbox=_ON_WHITE,
                zorder=2,
            )


def _describe(axes: Axes, document: dict[str, Any], *, several: bool) -> None:
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
    unigram = document["unigram_perplexity"]
    facts = [
        f"{document['position']} positions",
        f"step {document['step']:,}",
        shorten(str(document["data"]["name"]), 44, placeholder="..."),
    ]
    if unigram is not None:
        facts.append(f"unigram model: {unigram:,.1f}")
    if not several:
        facts.extend(_lines(document))
    axes.set_title(" · ".join(facts), loc="left", fontsize=9, color=_GREY)
    if several:
        axes.legend(frameon=False, fontsize=9, loc="best")
