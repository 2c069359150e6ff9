"""Parts that the plots share: a legend of many names, axes of large numbers."""

from itertools import pairwise

from matplotlib.axes import Axes

from training.evaluation.chart import add_legend, draw_curve, new_figure, scale_axes
from training.page.axis import fit_axis
from training.page.chart import Chart, Series


def drawn(*, lines: int, perplexity: float = 20.0) -> Axes:
    """Return axes of so many lines, whose names stand below them."""
    figure = new_figure(inches=(5.6, 4.6))
    axes = figure.subplots()
    for number in range(lines):
        draw_curve(axes, [(64, perplexity), (128, perplexity * 1.5)], label=f"run {number}", number=number)
    scale_axes(axes, lengths=[64, 128], perplexities=[perplexity, perplexity * 1.5], keep=[64])
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, dict(zip(labels, handles, strict=True)), columns=2)
    figure.draw_without_rendering()
    return axes


def test_a_legend_of_many_names_takes_no_room_from_the_axes() -> None:
    few, many = (drawn(lines=lines).get_window_extent().height for lines in (6, 40))
    assert 0.9 < many / few < 1.3


def test_labels_of_lengths_do_not_overlap() -> None:
    for count in (10, 12):
        lengths = [64 * 2**number for number in range(count)]
        axes = new_figure(inches=(5.6, 4.6)).subplots()
        draw_curve(axes, [(length, 20.0) for length in lengths], label="run", number=0)
        scale_axes(axes, lengths=lengths, perplexities=[20.0], keep=[64])
        axes.figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(boxes) >= 6
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), count


def test_large_numbers_have_no_common_factor() -> None:
    for perplexity, text in ((2e7, "2.4e+07"), (20.0, "24")):
        axes = drawn(lines=1, perplexity=perplexity)
        assert axes.yaxis.get_offset_text().get_text() == ""
        assert text in [label.get_text() for label in axes.get_yticklabels()]


def test_many_dots_have_no_edges_that_cover_others() -> None:
    def svg(points: int) -> str:
        series = Series("validation", [(float(x), 1.0) for x in range(points)], kind="dots")
        return Chart("Loss", "", "step", fit_axis([0.0, 1000.0]), fit_axis([0.0, 2.0]), (series,)).svg()

    assert 'class="curve dots c0"' in svg(20)
    assert 'class="curve dots c0 dense"' in svg(500)
    assert svg(500).count("<circle") == 500
