"""Output of `reproduce`."""

from configs.figures import counted
from configs.terminal import printable
from launch.show.console import narrow_table, show_folded, show_lines
from training.reproduction.differences import GRADES, Difference
from training.reproduction.reproduce import Reproduction

_COLUMNS = ("what", "then", "now", "does it matter")


def show_reproduction(reproduction: Reproduction) -> None:
    """Write what differs and whether it matters, then the commands that repeat the run."""
    starts, run_dir = reproduction.starts, reproduction.run_dir
    show_lines(f"{run_dir}: {counted(len(starts), 'start')}, the newest at {starts[-1]['started_at']}:")
    show_lines(f"  {starts[-1]['command']}", *([] if reproduction.differences else [""]))
    if reproduction.differences:
        _show_differences(reproduction.differences)
    if reproduction.same:
        show_lines(f"the same: {', '.join(reproduction.same)}")
    for number, step in dict.fromkeys((each.number, each.step) for each in reproduction.changes):
        show_lines("", f"start {number}, from step {step + 1}, differed from the one before it:")
        _show_differences([each.difference for each in reproduction.changes if each.number == number])
    show_lines(*(f"note: {note}" for note in reproduction.notes))
    after_table = reproduction.changes and not reproduction.notes  # which ends in an empty line
    show_lines(
        *([] if after_table else [""]),
        f"repeated from here it is at worst: {GRADES[reproduction.grade]}",
        "to repeat it:",
    )
    show_lines(*(f"  {command}" for command in reproduction.commands))


def _show_differences(differences: list[Difference]) -> None:
    table = narrow_table(_COLUMNS, left=_COLUMNS)
    for column in table.columns:
        column.overflow = "fold"
    for each in differences:
        table.add_row(*map(printable, (each.what, each.then, each.now, GRADES[each.grade])))
    show_folded(table)
