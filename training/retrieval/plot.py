"""Draw what a checkpoint retrieves: a heat map of depth against length for each task."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from configs.terminal import printable
from training.evaluation.chart import GREY, new_figure, save_figure, shorten
from training.evaluation.kept import other_precision

_ROWS = (("recall", "generated"), ("choice", "likeliest of ten"))
_COLOURS = "cividis"  # readable for colour-blind readers and in greyscale
_DARK_BELOW = 0.55  # a share whose cell is dark, so that its number is white
_LONGEST_NAME = 40


def draw_retrieval(report: dict[str, Any], path: Path) -> Path:
    """Draw a report as a PNG, a column per task; return its path.

    Args:
        report: The contents of the report.
        path: The PNG; an existing file is replaced whole.
    """
    tasks = list(dict.fromkeys(result["task"] for result in report["results"]))
    lengths = sorted({result["length"] for result in report["results"]})
    widths = [0.55 * len(lengths) + 0.7] * len(tasks)
    figure = new_figure(inches=(max(6.4, sum(widths) + 1.6), 5.2))
    grid = figure.subplots(len(_ROWS), len(tasks), squeeze=False)
    image, labelled = None, None
    for column, task in enumerate(tasks):
        results = [result for result in report["results"] if result["task"] == task]
        depths = list(dict.fromkeys(result["depth"] for result in results))
        for row, (key, _) in enumerate(_ROWS):
            axes = grid[row, column]
            image = _draw_cells(axes, results, key=key, lengths=lengths, depths=depths)
            _mark_training_length(axes, lengths, train_length=report["train_length"])
            axes.tick_params(labelbottom=row == len(_ROWS) - 1, labelleft=depths != labelled)
            if not row:
                axes.set_title(task, fontsize=10, fontweight="bold")
        labelled = depths
    for row, (key, meaning) in enumerate(_ROWS):
        grid[row, 0].set_ylabel(f"{key} ({meaning})\nneedle's depth", fontsize=9)
    assert image is not None, "a report has results"
    bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.02, ticks=[0, report["chance"], 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(
        ["0 %", f"{100 * report['chance']:.0f} % (a guess)", "25 %", "50 %", "75 %", "100 %"], fontsize=8
    )
    figure.supxlabel("length (tokens)", fontsize=10)
    facts = " · ".join(_facts(report))
    figure.suptitle(f"Retrieval by depth and length\n{facts}", fontsize=10, color=GREY, parse_math=False)
    return save_figure(figure, path)


def _draw_cells(
    axes: Axes, results: list[dict[str, Any]], *, key: str, lengths: list[int], depths: list[float | None]
) -> Any:
    """Draw the shares of one task; a length that was not measured stays white."""
    shares = np.full((len(depths), len(lengths)), np.nan)
    for result in results:
        shares[depths.index(result["depth"]), lengths.index(result["length"])] = result[key]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=_COLOURS, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8, rotation=45)
    axes.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:.0%}" for depth in depths], fontsize=8)
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share < _DARK_BELOW else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _mark_training_length(axes: Axes, lengths: list[int], *, train_length: int) -> None:
    """Draw a line behind the last length that the model was trained at, if longer ones follow."""
    trained = sum(length <= train_length for length in lengths)
    if 0 < trained < len(lengths):
        axes.axvline(trained - 0.5, color="#D55E00", linestyle="--", linewidth=1.6)


def _facts(report: dict[str, Any]) -> list[str]:
    name = shorten(printable(str(report["data"]["name"])), characters=_LONGEST_NAME)
    facts = [f"{report['position']} positions", f"step {report['step']:,}", name, f"seed {report['seed']}"]
    facts += filter(None, [report.get("scale"), other_precision(report)])
    return [*facts, f"dashed: training length {report['train_length']:,}"]
