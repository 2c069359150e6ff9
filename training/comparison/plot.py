"""Draw runs in one picture: perplexity against length, and loss against tokens."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter

from configs.errors import MachineError
from configs.figures import scaled, told_apart
from configs.terminal import printable
from training.comparison.comparison import Comparison, TextResults
from training.comparison.run import ComparedRun
from training.evaluation.chart import (
    add_legend,
    draw_curve,
    head_axes,
    line_style,
    mark_training_lengths,
    new_figure,
    save_figure,
    scale_axes,
    shorten,
    write_above,
    write_large_numbers,
)
from training.own_file import check_own_file

_SOFTWARE = "trainshort compare"
_PNG = b"\x89PNG\r\n\x1a\n"
_SMOOTHED_SHARE = 0.02  # of the steps, averaged for a point of the loss curve
_SHOWN_FROM = 0.03  # share of the steps: the first losses would flatten the rest
_MOST_POINTS = 400  # of a loss curve
_MOST_LARGE = 60  # validations of a run; more would lie over each other and over the curves
_LINES = ("-", "--", "-.", ":")  # of the loss curves, which have no markers
_LONGEST_LABEL, _LONGEST_NAME = 40, 30  # characters that fit


def check_plot_file(path: Path) -> None:
    """Refuse a path whose file is not a plot that `draw_comparison` wrote: it would be overwritten.

    Raises:
        InputError: it is another file, or has another ending than .png.
    """
    mark = f"tEXtSoftware\0{_SOFTWARE}".encode()
    check_own_file(
        path, what="plot", form="a PNG", ending=".png", is_ours=lambda head: head.startswith(_PNG) and mark in head
    )


def draw_comparison(comparison: Comparison, path: Path) -> Path | None:
    """Draw the perplexities on the text with the most runs, and the losses, as a PNG; return its path.

    Args:
        comparison: The runs.
        path: The PNG; an existing file is replaced whole.
    Returns:
        The path; None if there is nothing to draw.
    Raises:
        MachineError: it cannot be written.
    """
    trained = [number for number, run in enumerate(comparison.runs) if _losses(run)[0].size]
    panels = int(bool(comparison.texts)) + int(bool(trained))
    if not panels:
        return None
    figure = new_figure(inches=(5.6 * panels, 4.6))
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    if comparison.texts:
        _draw_perplexities(all_axes[0], comparison, comparison.texts[0])
    if trained:
        _draw_losses(all_axes[-1], comparison, trained)
    # the first panel's: its lines have markers
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, line)
    columns = min(3, len(handles)) if max(map(len, handles)) <= 24 else 2
    add_legend(figure, handles, columns=columns)
    try:
        return save_figure(figure, path, software=_SOFTWARE)
    except OSError as error:
        raise MachineError(f"plot {path} cannot be written ({error.strerror}): give another --out") from None


def _draw_perplexities(axes: Axes, comparison: Comparison, text: TextResults) -> None:
    keys = _keys_of_one_protocol(text)
    measured = {
        number: {key[2]: value for key in keys if (value := text.value(number, key)) is not None}
        for number in text.runs
    }
    measured = {number: points for number, points in measured.items() if points}
    trained_at = {number: comparison.runs[number].train_length for number in measured}
    for number, points in measured.items():
        draw_curve(axes, points.items(), label=_label(comparison.runs[number]), number=number)
    scale_axes(
        axes,
        lengths={length for points in measured.values() for length in points},
        perplexities=[perplexity for points in measured.values() for perplexity in points.values()],
        keep=trained_at.values(),
    )
    facts = [shorten(printable(text.text), characters=_LONGEST_NAME), text.protocol(keys[0])]
    facts += mark_training_lengths(axes, {number: (trained_at[number], measured[number]) for number in measured})
    _write_last_values(axes, [max(points.items()) for points in measured.values()])
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(f"perplexity per {'word' if text.unit == 'word_perplexity' else 'token'}")
    head_axes(axes, heading="Perplexity against length", facts=" · ".join(facts))


def _write_last_values(axes: Axes, points: list[tuple[int, float]]) -> None:
    """Write the perplexity above the last point of each line, where no other line ends."""
    # in shares of the axes
    places = [axes.transAxes.inverted().transform(axes.transData.transform(point)) for point in points]
    for (length, perplexity), (x, y) in zip(points, places, strict=True):
        if any(abs(x - other_x) < 0.12 and 0 < other_y - y < 0.09 for other_x, other_y in places):
            continue
        text = f"{perplexity:,.1f}" if perplexity < 1e4 else f"{perplexity:.2g}"
        write_above(axes, text, point=(length, perplexity))


def _keys_of_one_protocol(text: TextResults) -> list[tuple[str, int, int]]:
    """Return what was measured with the protocol that has the most perplexities of the runs."""
    protocols: dict[str, list[tuple[str, int, int]]] = {}
    for key in text.keys:
        protocols.setdefault(text.protocol(key), []).append(key)
    return max(
        protocols.values(),
        key=lambda keys: sum(text.value(number, key) is not None for key in keys for number in text.runs),
    )


def _draw_losses(axes: Axes, comparison: Comparison, trained: list[int]) -> None:
    tops = []
    for number in trained:
        run = comparison.runs[number]
        tokens, losses = _losses(run)
        style = line_style(number)
        dashes = _LINES[number % len(_LINES)]
        dot = "." if losses.size == 1 else None  # a line needs two points
        axes.plot(tokens, losses, dashes, marker=dot, label=_label(run), color=style["color"], linewidth=1.4, zorder=2)
        validated = run.steps.points("tokens_seen", "validation_loss")
        axes.plot(
            [x for x, _ in validated],
            [y for _, y in validated],
            linestyle="none",
            markersize=5.5 if len(validated) <= _MOST_LARGE else 2,
            zorder=3,
            label=_label(run),
            **style,
        )
        tops += [float(losses[int(_SHOWN_FROM * losses.size)]), *(y for _, y in validated)]
    bottom, _ = axes.get_ylim()
    axes.set_ylim(bottom, max(tops) + 0.05 * (max(tops) - bottom) or None)
    write_large_numbers(axes, highest=max(tops))
    axes.xaxis.set_major_formatter(_Counts())
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    head_axes(axes, heading="Loss against tokens", facts="lines: training, smoothed · points: validation")


class _Counts(Formatter):
    """Writes ticks as counts."""

    def __call__(self, x: float, _: int | None = None) -> str:
        return scaled(x)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return told_apart(values, scaled)


def _losses(run: ComparedRun) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return tokens and smoothed training losses, each [points]."""
    points = run.steps.points("tokens_seen", "loss")
    losses = np.array([loss for _, loss in points], np.float64)
    width = max(1, math.ceil(_SMOOTHED_SHARE * losses.size))
    # the mean of the last `width` losses at each step; of fewer at the first ones
    sums = np.cumsum(np.concatenate([np.zeros(1), losses]))
    last = np.arange(1, losses.size + 1)
    smooth = (sums[last] - sums[np.maximum(last - width, 0)]) / np.minimum(last, width)
    chosen = np.unique(np.linspace(0, losses.size - 1, min(losses.size, _MOST_POINTS)).astype(int))
    return np.array([points[number][0] for number in chosen], np.float64), smooth[chosen]


def _label(run: ComparedRun) -> str:
    # matplotlib leaves labels that begin with an underscore out of a legend
    return shorten(printable(run.label), characters=_LONGEST_LABEL).lstrip("_") or "run"
