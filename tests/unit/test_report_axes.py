"""The charts of a page: the points that a curve keeps, and the ticks of its axes."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from configs.load import check_run
from tests.support.compared_runs import add_report, make_run
from tests.support.small_run import ONE_RANK, small_run
from training.comparison.comparison import compare_runs
from training.comparison.plot import draw_comparison
from training.page.axis import fit_axis, lengths_axis, linear_ticks, write_value
from training.page.chart import MOST_POINTS, thin
from training.page.curves import bias_chart, perplexity_charts, training_charts


def test_a_curve_keeps_its_ends_and_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {points[0], points[54_321], points[77_777], points[-1]} <= {*kept}
    assert kept == sorted(kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_axes_have_round_ticks_that_read_well() -> None:
    assert linear_ticks(0.0, 1.06) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert fit_axis([1.0, 3.0], unit="count", pad=False).ticks == (1.0, 2.0, 3.0), "there is no half of a step"
    axis = fit_axis([0.5, 80.0], may_be_logarithmic=True)
    assert (axis.logarithmic, axis.ticks) == (True, (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0))
    assert [axis.place(value) for value in (axis.low, axis.high, 0.0)] == [0.0, 1.0, -1.0]
    assert lengths_axis([128, 300, 512, 16_384], keep=[256]).ticks == (128, 256, 512, 16_384)
    written = [write_value(value, unit="plain") for value in (0.0, 0.25, 2e-4, 1.5e-4, 12_000.0, 3.2e6)]
    assert written == ["0", "0.25", "2e-4", "1.5e-4", "12,000", "3.2e6"]
    assert [write_value(value, unit="count") for value in (16_384, 1e8, 2e10)] == ["16,384", "100M", "20B"]
    sizes = [write_value(value, unit="gigabytes") for value in (0.5, 1.0, 1.5, 20.0, 1.25, 100.0)]
    assert sizes == ["500 MB", "1 GB", "1.5 GB", "20 GB", "1.25 GB", "100 GB"]


def test_the_ticks_of_an_axis_differ() -> None:
    # what a branch of a long run shows: a narrow part of an axis far from 0
    for values, unit, texts in (
        ((-3.42e-3, -3.21e-3), "plain", ["-3.4e-3", "-3.35e-3", "-3.3e-3", "-3.25e-3"]),
        ((1.0e-3, 1.01e-3), "plain", ["1e-3", "1.002e-3", "1.004e-3", "1.006e-3", "1.008e-3", "1.01e-3"]),
        ((2.0e6, 2.01e6), "plain", ["2e6", "2.002e6", "2.004e6", "2.006e6", "2.008e6", "2.01e6"]),
        ((100_000, 102_000), "count", ["100k", "100.5k", "101k", "101.5k", "102k"]),
        ((2_000_000, 2_030_000), "count", ["2M", "2.005M", "2.01M", "2.015M", "2.02M", "2.025M", "2.03M"]),
        ((80.0, 80.8), "gigabytes", ["80 GB", "80.2 GB", "80.4 GB", "80.6 GB", "80.8 GB"]),
    ):
        axis = fit_axis(values, unit=unit, pad=False)
        assert axis.tick_texts() == texts


def test_the_steps_of_a_branch_fill_the_axis() -> None:
    # a range of less than a hundredth of its ends, which an axis of losses would widen
    axis = fit_axis([1_000_001, 1_002_000], unit="count", pad=False)
    assert (axis.low, axis.high) == (1_000_001, 1_002_000)
    assert axis.tick_texts() == ["1.0005M", "1.001M", "1.0015M", "1.002M"]
    loss = fit_axis([2.4999, 2.5001])
    assert loss.high - loss.low > 0.025
    alone = fit_axis([5.0], unit="count", pad=False)
    assert (alone.low < 5 < alone.high, alone.tick_texts()) == (True, ["5"])


def test_the_counts_of_the_plot_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")
    steps = [{"step": step, "tokens_seen": 10_000_000 + 1_000 * step, "loss": 3.0} for step in range(1, 11)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    figures: list[Figure] = []
    monkeypatch.setattr("training.comparison.plot.save_figure", lambda figure, path, **_: figures.append(figure))
    draw_comparison(compare_runs([run], text=None), tmp_path / "comparison.png")
    axis = figures[0].axes[-1].xaxis
    texts = axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
    assert len({*texts}) == len(texts) > 3
    assert "10.002M" in texts


def test_axes_hold_the_largest_and_the_smallest_numbers() -> None:
    for values in ([20.0, 1e300], [1e-320, 1.0], [-1.7e308, 1.7e308], [1e308], [1e-310, 1e-309]):
        for logarithmic in (False, True):
            axis = fit_axis(values, may_be_logarithmic=logarithmic)
            assert -math.inf < axis.low < axis.high < math.inf
            assert all(math.isfinite(axis.place(value)) for value in (axis.low, 1.0, axis.high))
            assert axis.ticks


@pytest.mark.parametrize("trained", [2, 8, 1000])
def test_the_distances_of_a_bias_are_whole(trained: int) -> None:
    chart = bias_chart(check_run(small_run(ONE_RANK), name="a run").model, trained=trained)
    assert chart is not None
    ticks = chart.x.ticks
    assert {1, trained} <= {*ticks}
    assert [write_value(tick, unit="count") for tick in ticks] == [f"{tick:,}" for tick in ticks]


def test_the_axis_of_losses_fits_the_curves_that_are_drawn(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run in runs:
        steps = [{"step": step, "tokens_seen": step, "loss": 3 + 2 * (step % 2)} for step in range(1, 401)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    # of three runs the means alone are drawn, which are near 4
    for some, (low, high) in ((runs[:2], (2.9, 5.1)), (runs, (3.8, 4.2))):
        axis = training_charts(compare_runs(some, text=None), marks=[])[0].y
        assert (axis.low, axis.high) == pytest.approx((low, high), abs=0.1)


def test_windows_that_do_not_overlap_are_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        report = add_report(run, {32: 20.0, 64: 19.0})
        contents = json.loads(report.read_text())
        contents["results"] += [{**each, "protocol": "last", "scored": 8} for each in contents["results"]]
        report.write_text(json.dumps(contents))
    compared = compare_runs(runs, text=None)
    (chart,) = perplexity_charts(compared)
    assert chart.facts.endswith("; solid: nonoverlapping, dashed: last:8")
    figures: list[Figure] = []
    monkeypatch.setattr("training.comparison.plot.save_figure", lambda figure, path, **_: figures.append(figure))
    draw_comparison(compared, tmp_path / "comparison.png")
    assert "nonoverlapping" in figures[0].axes[0].get_title(loc="left")
