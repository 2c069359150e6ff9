"""Output of `study`: the plan, and the results."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.commands import typed_path
from configs.figures import duration, scaled
from configs.paths import data_folder
from configs.secrets import hide_secrets
from configs.terminal import printable
from launch.show.console import narrow_table, show_folded, show_lines
from launch.study.execution import prepare_arguments, summary_line
from training.study.progress import RunProgress, expected_seconds
from training.study.table import NOT_MEASURED, named_differences, perplexity_cells

if TYPE_CHECKING:
    from configs.study import LoadedStudy, PlannedRun
    from training.study.table import StudyTable

_PLAN_COLUMNS = ("run", "differs in", "state", "step", "tokens left", "time")
_STATES = {"finished": "finished", "collect": "evaluated", "evaluate": "trained"}


def show_plan(loaded: "LoadedStudy", progress: Sequence[RunProgress], *, unprepared: "Sequence[PlannedRun]") -> None:
    """Write what a study would do: its runs with their tokens and the time of training, and the data to prepare."""
    times = expected_seconds(progress)
    table = narrow_table(_PLAN_COLUMNS, left=_PLAN_COLUMNS[:3])
    for each in progress:
        planned, seconds = each.planned, times[each.planned.label]
        differing = named_differences(planned, loaded)
        steps = planned.config.train.steps
        step = steps if each.stage in ("finished", "collect", "evaluate") else each.step
        trains = each.stage == "train"
        table.add_row(
            planned.label,
            printable(", ".join(f"{key}: {value}" for key, value in differing.items()) or NOT_MEASURED),
            _STATES.get(each.stage, f"to go on at {each.step:,}" if each.step else "new"),
            f"{step:,}/{steps:,}",
            scaled(each.tokens_left) if trains else NOT_MEASURED,
            duration(seconds) if trains and seconds else NOT_MEASURED,
        )
    show_folded(table)
    for planned in unprepared:
        words = shlex.join(prepare_arguments(planned, loaded))
        show_lines(f"data to prepare first, {data_folder(planned.config)}: {hide_secrets(words)}")
    show_lines(summary_line(progress), "dry run: nothing was started, nothing was written")


def show_study(table: "StudyTable") -> None:
    """Write the perplexities of a study, a table per text, and what keeps them from being compared."""
    for text in table.texts:
        show_lines(f"perplexity per token on {text.text}, {text.protocol}")
        grid = narrow_table(("run", "seed", *(f"{length:,}" for length in text.lengths)), left=("run",))
        for cells in perplexity_cells(table, text):
            grid.add_row(*map(printable, cells))
        show_folded(grid)
    show_lines(*(f"note: {note}" for note in table.notes()))
    if not table.rows:
        show_lines(f"{table.loaded.study.name} has no finished run yet: {typed_path(table.loaded.rows)} has no row")
