"""Draw a study: perplexity against length, a line per run, its seeds as a band."""

from pathlib import Path

from matplotlib.axes import Axes

from configs.terminal import printable
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
)
from training.study.table import FIGURE_NAME, StudyTable, TextTable, unwritable_study

_LONGEST_NAME = 30  # characters of a text's name that fit


def draw_study(table: StudyTable) -> Path | None:
    """Draw the perplexities of a study as a PNG in its folder, a panel per text and protocol; return its path.

    Returns:
        The path; None if there is nothing to draw.
    Raises:
        MachineError: it cannot be written.
    """
    if not table.drawn:
        return None
    path = table.loaded.folder / FIGURE_NAME
    figure = new_figure(inches=(7.0 * len(table.drawn), 5.2))
    all_axes = figure.subplots(1, len(table.drawn), squeeze=False)[0]
    for axes, text in zip(all_axes, table.drawn, strict=True):
        _draw_text(axes, table, text)
    lines = {label: line for axes in all_axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = {name: lines[name] for name in table.names if name in lines}
    add_legend(figure, shown, columns=min(4, len(shown)))
    try:
        return save_figure(figure, path)
    except OSError as error:
        raise unwritable_study(path.parent, error) from None


def _draw_text(axes: Axes, table: StudyTable, text: TextTable) -> None:
    curves = {name: values for name in table.names if (values := text.seeds_of(name))}
    trained_at = {row.run: int(row.figures["train_length"]) for row in table.rows if row.run in curves}
    numbers = {name: number for number, name in enumerate(table.names)}  # a line looks alike in all panels
    for name, values in curves.items():
        number = numbers[name]
        draw_curve(axes, [(length, each.mean) for length, each in values.items()], label=name, number=number)
        lowest, highest = [each.lowest for each in values.values()], [each.highest for each in values.values()]
        axes.fill_between([*values], lowest, highest, color=line_style(number)["color"], alpha=0.2, linewidth=0)
    scale_axes(
        axes,
        lengths=text.lengths,
        perplexities=[
            perplexity
            for each in curves.values()
            for value in each.values()
            for perplexity in (value.lowest, value.highest)
        ],
        keep=trained_at.values(),
    )
    facts = [shorten(printable(text.text), characters=_LONGEST_NAME), text.protocol]
    means = {name: {length: each.mean for length, each in values.items()} for name, values in curves.items()}
    facts += mark_training_lengths(axes, {numbers[name]: (trained_at[name], means[name]) for name in curves})
    if any(len({row.seed for row in table.rows if row.run == name}) > 1 for name in curves):
        facts.append("bands: seeds")
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel("perplexity per token")
    name = shorten(table.loaded.study.name, characters=_LONGEST_NAME)
    head_axes(axes, heading=f"{name}: perplexity against length", facts=" · ".join(facts))
