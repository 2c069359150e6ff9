"""Output of `harness`."""

from pathlib import Path
from typing import Any

from launch.show.console import narrow_table, show_lines, show_table
from training.evaluation.kept import other_precision
from training.harness.kept import metric_name, shown_samples, shown_value


def show_results(report: dict[str, Any]) -> None:
    """Write the table of the results of tasks.

    Args:
        report: What `training.harness.run.run_harness` returns.
    """
    rows = report["results"]
    longest = f", inputs of up to {rows[0]['max_length']:,}" if rows else ""
    precision = other_precision(rows[0]) if rows else None
    computed = "" if precision is None else f", computed in {precision}"
    show_lines(f"{Path(report['checkpoint']).name}, trained at {report['train_length']:,} tokens{longest}{computed}")
    table = narrow_table(("task", "metric", "value", "stderr", "few-shot", "samples"), left=("task", "metric"))
    for row in rows:
        table.add_row(
            row["task"],
            metric_name(row),
            shown_value(row["value"]),
            shown_value(row["stderr"]),
            "-" if row["fewshot"] is None else str(row["fewshot"]),
            shown_samples(row),
        )
    show_table(table)
