"""Draw charts as SVG, in a few elements that the page's style sheet colours. Imports no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Literal

from configs.terminal import printable
from training.page.axis import ChartAxis

MOST_POINTS = 1000  # of a curve; a screen is not wider
COLOURS = 8  # classes c0 to c7 of the style sheet
# in units of the drawing, which is as wide as a phone: text then has its natural size
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 18, 40
_LINE, _LETTER = 13, 7.2  # height of a line of text, and at most the mean width of a letter
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_DOT = 4  # at most what a dot takes on either side
_RADIUS, _SMALL_RADIUS = 3.2, 1.6
_MOST_LARGE = 60  # dots; the edges of more would cover those beside them, and the curves behind
DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 3", "dashes and dots": "10 3 2 3"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
        label: What it shows; with several runs, the run's label.
        points: Finite x and y of each point, by x.
        run: Number of its run, which selects its colour unless `colour` does.
        kind: A line; a thin faint one; dots; a line with dots.
        dash: Number of its dashes; 0 is a solid line.
        colour: Number of its colour; None for the run's.
        shade: Instead of a colour, a place between two, from 0 to 1: for curves that have an order.
    """

    label: str
    points: Sequence[Point]
    run: int = 0
    kind: Literal["line", "faint", "dots", "marked"] = "line"
    dash: int = 0
    colour: int | None = None
    shade: float | None = None

    @property
    def style_class(self) -> str:
        """Class of the style sheet that has its colour."""
        return (
            "shaded" if self.shade is not None else f"c{(self.run if self.colour is None else self.colour) % COLOURS}"
        )


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value of x, with a text above it."""

    x: float
    text: str = ""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: Heading above it.
        facts: A line below the heading: what the lines are, the unit.
        x_title: Text below the x axis.
        x, y: The axes.
        series: The curves; those of a chart are drawn in their order.
        marks: Vertical lines.
        is_large: Whether it is one of the few that a reader looks at first.
    """

    title: str
    facts: str
    x_title: str
    x: ChartAxis
    y: ChartAxis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    is_large: bool = False

    @property
    def is_shaded(self) -> bool:
        """Whether its curves have an order, which their colours show."""
        return len(self.series) > 1 and all(each.shade is not None for each in self.series)

    def svg(self) -> str:
        """Return the chart as an SVG element; page.js reads its data attributes to show values at the pointer."""
        label = _text(f"{self.title}: {', '.join(dict.fromkeys(each.label for each in self.series))}")
        parts = [
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
            f'data-plot="{_LEFT} {_TOP} {_PLOT_WIDTH} {_PLOT_HEIGHT}" {_data("x", self.x)} {_data("y", self.y)}>',
            *_grid(self.x, self.y),
            f'<text class="axis" x="{_LEFT + _PLOT_WIDTH / 2:g}" y="{_HEIGHT - 4}" text-anchor="middle">'
            f"{_text(self.x_title)}</text>",
            *self._marks(),
            # an inner picture cuts off what lies outside of the axes, but no dot at their ends
            f'<svg class="plot" x="{_LEFT - _DOT}" y="{_TOP}" width="{_PLOT_WIDTH + 2 * _DOT}" '
            f'height="{_PLOT_HEIGHT}" viewBox="{-_DOT} 0 {_PLOT_WIDTH + 2 * _DOT} {_PLOT_HEIGHT}">',
            *(self._curve(each) for each in self.series if each.points),
            "</svg>",
            "</svg>",
        ]
        return "\n".join(parts)

    def _curve(self, series: Series) -> str:
        places = [(self.x.place(x) * _PLOT_WIDTH, (1 - self.y.place(y)) * _PLOT_HEIGHT) for x, y in thin(series.points)]
        # far outside of the plot a coordinate needs no value of its own
        texts = [f"{x:.2f},{min(max(y, -2.0 * _HEIGHT), 2.0 * _HEIGHT):.2f}" for x, y in places]
        dash = [*DASHES.values()][series.dash % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash and series.kind != "dots" else ""
        shade = "" if series.shade is None else f' style="--shade:{series.shade:.3f}"'
        is_dense = len(texts) > _MOST_LARGE  # of a line without dots it changes nothing
        kind = f"{series.kind} {series.style_class}{' dense' if is_dense else ''}"
        radius = _SMALL_RADIUS if is_dense else _RADIUS
        group = f'<g class="curve {kind}"{shade} data-run="{series.run}" data-label="{_text(series.label)}">'
        path = f'<path d="M{"L".join(texts)}"{style}/>'
        dots = ""
        if series.kind in ("dots", "marked") or len(texts) == 1:  # a line needs two points
            dots = "".join('<circle cx="{}" cy="{}" r="{}"/>'.format(*text.split(","), radius) for text in texts)
        return f"{group}{path}{dots}</g>"

    def _marks(self) -> Iterator[str]:
        """Yield the marks: texts stand above the axes; one that would lie over another stands below it."""
        ends: list[float] = []  # of each line of texts
        for mark in sorted(self.marks, key=lambda mark: mark.x):
            place = self.x.place(mark.x)
            if not 0 <= place <= 1:
                continue
            x = _LEFT + place * _PLOT_WIDTH
            if mark.text:
                half = _LETTER * len(mark.text) / 2
                middle = min(max(x, _LEFT + half), _WIDTH - half)
                row = next((row for row, end in enumerate(ends) if end < middle - half), len(ends))
                ends[row : row + 1] = [middle + half]
                y = _TOP - 5 + row * _LINE
                yield f'<text class="marktext" x="{middle:.1f}" y="{y}" text-anchor="middle">{_text(mark.text)}</text>'
            yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _PLOT_HEIGHT}"/>'


def thin(points: Sequence[Point]) -> list[Point]:
    """Return at most MOST_POINTS points: the first, the last, and the lowest and the highest of each part of the curve.

    So a spike of one step stays.
    """
    if len(points) <= MOST_POINTS:
        return [*points]
    parts = (MOST_POINTS - 2) // 2
    inner, kept = points[1:-1], [points[0]]
    for part in range(parts):
        bucket = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        ends = {min(bucket, key=_height), max(bucket, key=_height)}
        kept += sorted(ends)
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], *, share: float) -> list[Point]:
    """Return the mean of the points around each point; `share` of all of them, fewer near the ends."""
    half = math.ceil(share * len(points)) // 2
    if not half:  # sums would round
        return [*points]
    sums = [0.0, *accumulate(y for _, y in points)]
    means = []
    for number, (x, _) in enumerate(points):
        first, end = max(0, number - half), min(len(points), number + half + 1)
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def _height(point: Point) -> float:
    return point[1]


def _text(text: str) -> str:
    return escape(printable(text), quote=True)


def _data(name: str, axis: ChartAxis) -> str:
    kind = "log" if axis.logarithmic else "linear"
    return f'data-{name}="{axis.low!r} {axis.high!r} {kind} {axis.unit}"'


def _grid(x: ChartAxis, y: ChartAxis) -> list[str]:
    bottom, right = _TOP + _PLOT_HEIGHT, _LEFT + _PLOT_WIDTH
    parts = []
    for tick, text in zip(y.ticks, y.tick_texts(), strict=True):
        height = bottom - y.place(tick) * _PLOT_HEIGHT
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{_text(text)}</text>')
    for tick, text in zip(x.ticks, x.tick_texts(), strict=True):
        place = _LEFT + x.place(tick) * _PLOT_WIDTH
        parts.append(f'<line class="base" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        anchor = "end" if place > right - 12 else "middle"
        shift = min(_RIGHT, 12) if anchor == "end" else 0
        parts.append(
            f'<text class="tick" x="{place + shift:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{_text(text)}</text>'
        )
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return parts
