"""Parts that the plots of an evaluation and of a comparison share: colours, axes, the training length, the file."""

import secrets
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from configs.files import whole_file

GREY = "#555555"
# a background for text, so that it stays readable across a line
TEXT_BOX = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
# The palette of Okabe and Ito, safe for colour-blind readers. The markers distinguish the lines in greyscale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":")  # of the lines from the seventh on, whose colours repeat
# make the axis logarithmic from this ratio of the highest perplexity to the lowest
_LOGARITHMIC_RATIO = 6.0
# label only powers of ten from this ratio
_MANY_DECADES = 1e4
_LARGE_NUMBER = 1e6  # from here on matplotlib would write a common factor, over the heading
_LEGEND_ROWS, _LEGEND_ROW_INCHES = 3, 0.23  # rows that a figure has room for; the height of a further one
_HEADING_POINTS = 22  # of the heading above the axes, to leave a line for the title


def new_figure(*, inches: tuple[float, float]) -> Figure:
    """Return an empty figure that needs no display and shares no state with a caller's pyplot."""
    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, *, software: str | None = None) -> Path:
    """Write a figure as a PNG and return its path; an existing file is replaced whole.

    Args:
        figure: The figure.
        path: The file; folders above it are made.
        software: What the file says of the program that made it; None for matplotlib's own words.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = None if software is None else {"Software": software}
    with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary, warnings.catch_warnings():
        # A character that the font lacks, in the name of a text, is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png", metadata=metadata)
    return path


def line_style(number: int) -> dict[str, Any]:
    """Return colour and marker of a line; after the sixth, both repeat in another pairing."""
    turn, place = divmod(number, len(_COLOURS))
    return {"color": _COLOURS[place], "marker": _MARKERS[(place + turn) % len(_MARKERS)]}


def write_above(axes: Axes, text: str, *, point: tuple[int, float], bbox: dict[str, Any] | None = None) -> None:
    """Write a value above a point of a line; `bbox` is the background."""
    axes.annotate(
        text, xy=point, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9, bbox=bbox, zorder=2
    )


def draw_curve(axes: Axes, points: Iterable[tuple[int, float]], *, label: str, number: int) -> None:
    """Draw perplexity against length as a line.

    Args:
        axes: Where to draw.
        points: Length and perplexity of each point.
        label: Its text in a legend.
        number: Selects its style.
    """
    lengths, perplexities = zip(*sorted(points), strict=True)
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    style = line_style(number)
    axes.plot(lengths, perplexities, dashes, label=label, linewidth=1.8, markersize=5.5, zorder=3, **style)


def scale_axes(axes: Axes, *, lengths: Collection[int], perplexities: Collection[float], keep: Collection[int]) -> None:
    """Set the scales: lengths doubling, perplexity logarithmic if it spans much.

    Args:
        axes: Where the curves are.
        lengths: Lengths of all points.
        perplexities: Perplexities of all points.
        keep: Lengths that the axis must show and label: the training lengths.
    """
    shown = sorted({*lengths, *keep})
    axes.set_xscale("log", base=2)
    axes.set_xlim(shown[0] / 2**0.35, shown[-1] * 2**0.35)
    axes.xaxis.set_major_locator(FixedLocator(_label_lengths(shown, keep=keep)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = min(perplexities), max(perplexities)
    if high / low >= _LOGARITHMIC_RATIO:
        axes.set_yscale("log")
        subs = (1.0,) if high / low >= _MANY_DECADES else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / 1.3, high * 1.5)
        return
    # Show a range of at least a tenth of the value, so that a difference of a thousandth does not look like a cliff.
    margin = max(high - low, 0.1 * high)
    axes.set_ylim(low - 0.35 * margin, high + 0.45 * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    write_large_numbers(axes, highest=high)


def write_large_numbers(axes: Axes, *, highest: float) -> None:
    """Write large numbers of the vertical axis each in full."""
    if highest >= _LARGE_NUMBER:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def add_legend(figure: Figure, lines: Mapping[str, Artist], *, columns: int) -> None:
    """Write the names of lines below the axes; many names make the figure higher, and the axes no lower."""
    legend = figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False)
    for name in legend.get_texts():
        name.set_parse_math(False)  # a name with two dollar signs is not a formula
    further = max(0, -(-len(lines) // columns) - _LEGEND_ROWS)
    figure.set_figheight(figure.get_figheight() + further * _LEGEND_ROW_INCHES)


def mark_training_length(axes: Axes, length: int, *, text: str) -> None:
    """Draw a vertical line at a training length, with a text beside it at the top."""
    axes.axvline(length, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.annotate(
        text,
        xy=(length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
        bbox=TEXT_BOX,
    )


def mark_training_lengths(axes: Axes, curves: Mapping[int, tuple[int, Mapping[int, float]]]) -> list[str]:
    """Mark the training lengths of several lines: one with its name, several with a ring on each line.

    Args:
        axes: Where the lines are drawn.
        curves: The training length and the perplexities by length of each line, by its number.
    Returns:
        What has to be said of the marks.
    """
    lengths = sorted({trained_at for trained_at, _ in curves.values()})
    for length in lengths:
        mark_training_length(axes, length, text=f"training length {length:,}" if len(lengths) == 1 else "")
    if len(lengths) <= 1:
        return []
    for number, (trained_at, perplexities) in curves.items():
        if trained_at in perplexities:
            ring_point(axes, (trained_at, perplexities[trained_at]), number=number)
    return ["rings: training lengths"]


def ring_point(axes: Axes, point: tuple[int, float], *, number: int) -> None:
    """Draw a ring around a point of a line: its training length, where lines have several."""
    ring = {**line_style(number), "marker": "o", "markersize": 12, "fillstyle": "none"}
    axes.plot([point[0]], [point[1]], linestyle="none", zorder=4, **ring)


def head_axes(axes: Axes, *, heading: str, facts: str) -> None:
    """Write a heading and a line of facts above the axes, and leave only their left and lower side."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.annotate(
        heading,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, _HEADING_POINTS),
        textcoords="offset points",
        fontsize=12,
        fontweight="bold",
    )
    # A file name with two dollar signs is not a formula.
    axes.set_title(facts, loc="left", fontsize=9, color=GREY, parse_math=False)


def shorten(text: str, *, characters: int) -> str:
    """Return text that fits; what is cut is replaced by an ellipsis."""
    return text if len(text) <= characters else f"{text[: characters - 3]}..."


def _label_lengths(lengths: list[int], *, keep: Collection[int]) -> list[int]:
    """Return the lengths to label, far enough apart on a logarithmic axis that the labels do not overlap."""
    # The axis has room for ten labels such as 131,072; less than rounding errors, so that ten doublings have one each.
    least = (lengths[-1] / lengths[0]) ** (1 / 9) * (1 - 1e-9)
    chosen: list[int] = []
    for length in (*sorted(keep), *lengths):
        if all(max(length, other) / min(length, other) >= least for other in chosen):
            chosen.append(length)
    return sorted(chosen)
