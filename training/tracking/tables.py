"""Tables of evaluations, in the form that MLflow's page of a run shows and `mlflow.load_table` reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.errors import InputError
from training.evaluation.kept import read_report
from training.evaluation.results import protocol_name, result_key

TABLE_COLUMNS = (
    *("step", "checkpoint", "text", "protocol", "length", "x_trained", "scored_tokens", "loss", "standard_error"),
    *("perplexity", "word_perplexity", "bits_per_byte", "attention_density", "precision", "date"),
)


def evaluation_table(folder: Path, *, label: str) -> dict[str, Any]:
    """Return all results of a text in one table: a row per checkpoint, protocol with scale, and length, in this order.

    So checkpoints of a run compare within the table; it has the same path in every run, by which MLflow compares runs.

    Args:
        folder: RUN_DIR/evaluation.
        label: Label of the text and precision: the name of its reports.
    """
    rows = [row for file in folder.glob(f"*/{label}.json") for row in _rows(file)]
    rows.sort(key=lambda row: (row[0], row[1]))
    return {"columns": [*TABLE_COLUMNS], "data": rows}


def table_event(path: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the event that logs a table.

    Args:
        path: The artifact's path in the run.
        table: Its `columns`, and its rows as `data`.
    """
    return {"kind": "table", "artifact": path, "table": table}


def _rows(file: Path) -> Iterable[list[Any]]:
    try:
        report = read_report(file)
    except InputError:  # it is broken: `evaluate` says so
        return
    for result in sorted(report["results"], key=result_key):
        values = {
            **result,
            "step": report["step"],
            "checkpoint": Path(report["checkpoint"]).name,
            "text": report["data"]["name"],
            "protocol": protocol_name(result),
            "x_trained": result["length"] / report["train_length"],
            "scored_tokens": result["tokens"],
            "precision": report.get("precision"),
        }
        yield [values.get(column) for column in TABLE_COLUMNS]
