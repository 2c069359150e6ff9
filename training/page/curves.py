"""The charts of a page: how runs trained, their perplexities, and the bias of each head. Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from configs.positions import POSITIONS
from configs.schema import Model, RunConfig
from training.comparison.comparison import Comparison, TextResults
from training.comparison.run import ComparedRun
from training.evaluation.results import is_whole
from training.further_losses import fields_by_length, fields_by_source
from training.page.axis import ChartAxis, Unit, fit_axis, lengths_axis, linear_ticks
from training.page.chart import COLOURS, DASHES, Chart, Mark, Point, Series, smooth, thin

_SMOOTHED_SHARE = 0.02  # of the steps, averaged for a point of a curve
_MEAN_LABEL = f"mean of {_SMOOTHED_SHARE:.0%} of the steps"
_SHOWN_FROM = 0.03  # share of the steps: the first losses would flatten the rest
_MOST_FAINT = 2  # runs whose single steps are drawn behind the averages
_LEAST_BIAS = -12.0  # where the drawing of a bias ends: a key there has a weight of 6e-6 of its score's
_BIAS_TOP = 0.4
_BIAS_POINTS = 96


@dataclass(frozen=True)
class StepCurve:
    """How a field of metrics.jsonl is drawn.

    Attributes:
        field: Its name there.
        title, facts: Heading of the chart, and the line below it.
        unit: How its values are written.
        averaged: Whether the mean of neighbouring steps is drawn, or each step.
        from_zero: Whether the axis begins at 0.
    """

    field: str
    title: str
    facts: str
    unit: Unit
    averaged: bool = True
    from_zero: bool = True


STEP_CURVES = (
    StepCurve("learning_rate", "Learning rate", "of each step", "plain", averaged=False),
    StepCurve("grad_norm", "Gradient norm", "before clipping", "plain", from_zero=False),
    StepCurve("loss_scale", "Loss scale", "of fp16, of each step", "plain", averaged=False, from_zero=False),
    StepCurve("tokens_per_second", "Throughput", "tokens per second, all ranks, the step alone", "count"),
    StepCurve("model_flops_utilization", "Model FLOPs utilization", "share of all ranks' peak", "share"),
    StepCurve("memory_gb", "Memory", "peak of the rank that holds most", "gigabytes", averaged=False),
    StepCurve("attention_density", "Attention scores computed", "share of the causal scores", "share"),
)


def training_charts(comparison: Comparison, *, marks: Sequence[int]) -> list[Chart]:
    """Return the charts of the steps; none if no run has a step.

    Args:
        comparison: The runs.
        marks: Steps after which the one run was started again; empty for several runs.
    """
    runs = [(number, run) for number, run in enumerate(comparison.runs) if run.steps]
    if not runs:
        return []
    # runs whose steps have other sizes compare by tokens
    sizes = {_step_tokens(run.config) for _, run in runs}
    by: Literal["step", "tokens_seen"] = "step" if len(sizes) == 1 else "tokens_seen"
    charts = [_loss_chart(runs, by=by, marks=marks), _lengths_chart(runs, by=by), _sources_chart(runs, by=by)]
    charts += [_field_chart(runs, curve, by=by, marks=marks) for curve in STEP_CURVES]
    return [chart for chart in charts if chart is not None]


def _step_tokens(config: RunConfig) -> tuple[tuple[int, int | None], ...]:
    """Return the tokens of a run's steps, each with how many steps have them; None for those to the end."""
    stages = (*config.train.batch_warmup, (config.train.global_batch, None))
    return tuple((batch * config.data.sequence_length, steps) for batch, steps in stages)


def perplexity_charts(comparison: Comparison) -> list[Chart]:
    """Return a chart of perplexity against length for each text, then of loss against position where it is known."""
    charts = [_perplexity_chart(comparison, text) for text in comparison.texts]
    return charts + [chart for text in comparison.texts if (chart := _position_chart(comparison, text)) is not None]


def bias_chart(model: Model, *, trained: int) -> Chart | None:
    """Return a chart of the bias of each head against distance; None for positions without slopes.

    Args:
        model: The decoder's shape.
        trained: The training length.
    """
    slopes_of = POSITIONS[model.position].slopes
    if slopes_of is None:
        return None
    distances = [2.0 ** (number / (_BIAS_POINTS - 1) * math.log2(8 * trained)) for number in range(_BIAS_POINTS)]
    head_slopes = slopes_of(model)
    shades = [head / max(1, len(head_slopes) - 1) for head in range(len(head_slopes))]
    series = [
        Series(
            f"head {head}",
            [(distance, -slope * distance) for distance in distances if -slope * distance >= 2 * _LEAST_BIAS],
            shade=shade,
        )
        for head, (slope, shade) in enumerate(zip(head_slopes, shades, strict=True))
    ]
    window = [] if model.window is None else [Mark(model.window, f"window {model.window:,}")]
    return Chart(
        title="Attention bias per head",
        facts="added to the score of a key at a distance; -4.6 leaves 1 % of its weight",
        x_title="distance to the key (tokens)",
        x=lengths_axis({8 * trained >> halving for halving in range((8 * trained).bit_length())}, keep=[trained]),
        y=ChartAxis(_LEAST_BIAS, _BIAS_TOP, False, "plain", linear_ticks(_LEAST_BIAS, 0.0)),
        series=tuple(series),
        marks=(Mark(trained, f"training length {trained:,}"), *window),
    )


Runs = Sequence[tuple[int, ComparedRun]]
_Key = TypeVar("_Key", int, str)


def _loss_chart(runs: Runs, *, by: str, marks: Sequence[int]) -> Chart | None:
    several = len(runs) > 1
    series: list[Series] = []
    places: list[float] = []
    shown: list[float] = []
    for number, run in runs:
        points, validated = run.steps.points(by, "loss"), run.steps.points(by, "validation_loss")
        drawn = [*_averaged(number, run, points, faint=len(runs) <= _MOST_FAINT, several=several)]
        series += drawn
        label = f"{run.label}, validation" if several else "validation"
        series.append(Series(label, thin(validated), number, "dots", colour=number if several else 1))
        places += _ends(points) + _ends(validated)
        begin = points[int(_SHOWN_FROM * len(points))][0] if points else 0.0
        shown += [y for each in drawn for x, y in each.points if x >= begin] + [y for _, y in validated]
    if not shown:
        return None
    return Chart(
        is_large=True,
        title="Loss",
        facts="nats per token; " + ("dots: validation" if several else "training, and dots: validation"),
        x_title=_X_TITLES[by],
        x=_steps_axis(places),
        y=fit_axis(shown),
        series=_in_order(series),
        marks=tuple(map(Mark, marks)),
    )


def _lengths_chart(runs: Runs, *, by: str) -> Chart | None:
    """Return a chart of what further lengths add to the losses of validations; None if no run has further lengths."""
    curves = [
        {length: [*_added(run, field, by=by)] for length, field in fields_by_length(run.steps.fields).items()}
        for _, run in runs
    ]
    names = {length: f"{length:,} tokens" for length in sorted({length for of_run in curves for length in of_run})}
    facts = "validation loss less that at the training length, on one text"
    return _validations_chart(runs, curves, names, "Extrapolation during training", facts, by=by)


def _added(run: ComparedRun, field: str, *, by: str) -> Iterator[Point]:
    """Yield what a loss of each validation is above that at the training length."""
    for x, trained, loss in run.steps.rows(by, "validation_loss", field):
        if x is not None and trained is not None and loss is not None:
            yield x, loss - trained


def _sources_chart(runs: Runs, *, by: str) -> Chart | None:
    """Return a chart of the losses of validations on each source; None if no run tells them."""
    curves = [
        {source: run.steps.points(by, field) for source, field in fields_by_source(run.steps.fields).items()}
        for _, run in runs
    ]
    names = {source: source for of_run in curves for source in of_run}
    return _validations_chart(runs, curves, names, "Validation by source", "each on its held-out text", by=by)


def _validations_chart(
    runs: Runs,
    curves: Sequence[Mapping[_Key, list[Point]]],
    names: Mapping[_Key, str],
    title: str,
    facts: str,
    *,
    by: str,
) -> Chart | None:
    """Return a chart of some curves of each run: those of one run differ in colour, those of several in dashes."""
    if several := len(runs) > 1:  # the legend is that of the runs
        drawn = dict(zip(names, DASHES, strict=False))
        facts += f"; {', '.join(f'{line}: {names[key]}' for key, line in drawn.items())}"
        facts += f"; {len(names) - len(drawn)} more are not drawn" if len(drawn) < len(names) else ""
        curves = [{key: points for key, points in of_run.items() if key in drawn} for of_run in curves]
    places = {key: place for place, key in enumerate(names)}
    series = []
    for (number, run), of_run in zip(runs, curves, strict=True):
        for key, points in of_run.items():
            label, colour, dash = names[key], places[key], places[key] // COLOURS
            if several:
                label, colour, dash = f"{run.label}, {label}", number, places[key]
            series.append(Series(label, thin(points), number, "marked", dash=dash, colour=colour))
    losses = [y for each in series for _, y in each.points]
    if not losses:
        return None
    return Chart(
        title=title,
        facts=f"nats per token, {facts}",
        x_title=_X_TITLES[by],
        x=_steps_axis([x for each in series for x, _ in each.points]),
        y=fit_axis(losses),
        series=_in_order(series),
    )


def _field_chart(runs: Runs, curve: StepCurve, *, by: str, marks: Sequence[int]) -> Chart | None:
    several = len(runs) > 1
    series: list[Series] = []
    places: list[float] = []
    for number, run in runs:
        points = run.steps.points(by, curve.field)
        if curve.averaged:
            series += _averaged(number, run, points, faint=len(runs) <= _MOST_FAINT, several=several)
        else:
            label = run.label if several else curve.title.lower()
            series.append(Series(label, thin(points), number, dash=number // COLOURS))
        places += _ends(points)
    values = [y for each in series for _, y in each.points]
    nothing_left_out = curve.field == "attention_density" and {*values} == {1.0}
    if not values or nothing_left_out:
        return None
    return Chart(
        title=curve.title,
        facts=curve.facts,
        x_title=_X_TITLES[by],
        x=_steps_axis(places),
        y=fit_axis(values, unit=curve.unit, from_zero=curve.from_zero, may_be_logarithmic=not curve.from_zero),
        series=_in_order(series),
        marks=tuple(map(Mark, marks)),
    )


def _averaged(number: int, run: ComparedRun, points: list[Point], *, faint: bool, several: bool) -> Iterator[Series]:
    """Yield the mean of the steps around each step, and the steps themselves, faint; a short run has but the latter."""
    dash, averaged = number // COLOURS, smooth(points, share=_SMOOTHED_SHARE)  # colours repeat
    if averaged == points:
        yield Series(run.label if several else "each step", thin(points), number, dash=dash)
        return
    if faint:
        yield Series(f"{run.label}, each step" if several else "each step", thin(points), number, "faint")
    yield Series(run.label if several else _MEAN_LABEL, thin(averaged), number, dash=dash)


_X_TITLES = {"step": "step", "tokens_seen": "training tokens"}


def _steps_axis(places: Sequence[float]) -> ChartAxis:
    return fit_axis(places, unit="count", pad=False)


def _ends(points: Sequence[Point]) -> list[float]:
    """Return the first and the last place of a curve: a thinned one need not have them if steps stand out of order."""
    places = [x for x, _ in points]
    return [min(places), max(places)] if places else []


def _in_order(series: Sequence[Series]) -> tuple[Series, ...]:
    """Return the curves that have points; faint ones first, so that they cover no other."""
    return tuple(sorted((each for each in series if each.points), key=lambda each: each.kind != "faint"))


def _perplexity_chart(comparison: Comparison, text: TextResults) -> Chart:
    several = len(comparison.runs) > 1
    protocols = [*dict.fromkeys(text.protocol(key) for key in text.keys)]
    series = []
    for number in text.runs:
        for dash, protocol in enumerate(protocols):
            points = [*_measured(text, number, protocol=protocol)]
            label = comparison.runs[number].label if several else protocol
            label += f", {protocol}" if several and len(protocols) > 1 else ""
            colour = None if several else dash
            series.append(Series(label, points, number, "marked", dash=dash, colour=colour))
    trained = _trained_lengths(comparison, text)
    lengths = {int(length) for each in series for length, _ in each.points}
    # the keys of a chart of one run have their names
    of_lines = several and len(protocols) > 1
    names = [f"{line}: {name}" for line, name in zip(DASHES, protocols, strict=False)] if of_lines else protocols
    return Chart(
        is_large=True,
        title="Perplexity by length",
        facts=f"on {text.text}, per {'word' if text.unit == 'word_perplexity' else 'token'}; {', '.join(names)}",
        x_title="evaluation length (tokens)",
        x=lengths_axis(lengths, keep=trained),
        y=fit_axis([y for each in series for _, y in each.points], may_be_logarithmic=True),
        series=tuple(each for each in series if each.points),
        marks=tuple(Mark(length, f"training length {length:,}") for length in trained),
    )


def _position_chart(comparison: Comparison, text: TextResults) -> Chart | None:
    """Return loss against position: of one run each length, of several the longest; None where no result has it."""
    several, trained = len(comparison.runs) > 1, _trained_lengths(comparison, text)
    series: list[Series] = []
    for number, results in zip(text.runs, text.results, strict=True):
        curves = [(key[2], [*_by_position(results[key])]) for key in sorted(results) if is_whole(results[key])]
        curves = [(length, points) for length, points in curves if points]
        for place, (length, points) in enumerate(curves[-1:] if several else curves):
            words = f"{length:,} tokens"
            label = f"{comparison.runs[number].label}, {words}" if several else words
            shade = None if several else place / max(1, len(curves) - 1)
            series.append(Series(label, points, number, dash=number // COLOURS, shade=shade))
    if not series:
        return None
    positions = sorted({int(position) for each in series for position, _ in each.points})
    powers = {2 ** round(math.log2(position)) for position in positions}
    return Chart(
        is_large=True,
        title="Loss by position",
        facts=f"on {text.text}, nats per token",
        x_title="position in the window (tokens)",
        x=lengths_axis({*powers, positions[0], positions[-1]}, keep=trained),
        y=fit_axis([y for each in series for _, y in each.points]),
        series=tuple(series),
        marks=tuple(Mark(length, f"training length {length:,}") for length in trained),
    )


def _trained_lengths(comparison: Comparison, text: TextResults) -> list[int]:
    return sorted({comparison.runs[number].train_length for number in text.runs})


def _by_position(result: dict[str, Any]) -> Iterator[Point]:
    """Yield the loss at each position of a result's windows; the axis is logarithmic and has no 0."""
    known = result.get("loss_by_position") or {"positions": (), "loss": ()}
    for position, loss in zip(known["positions"], known["loss"], strict=True):
        if position > 0 and loss is not None and math.isfinite(loss):
            yield float(position), float(loss)


def _measured(text: TextResults, run: int, *, protocol: str) -> Iterator[Point]:
    for key in sorted(text.keys, key=lambda key: key[2]):
        value: Any = text.value(run, key)
        if text.protocol(key) == protocol and value is not None and math.isfinite(value):
            yield float(key[2]), float(value)
