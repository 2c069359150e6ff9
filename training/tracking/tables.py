"""Tables of what was measured, in the form that MLflow's page of a run shows and `mlflow.load_table` reads."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import InputError
from training.evaluation.kept import OTHER_MODEL, read_report
from training.evaluation.results import protocol_name, result_key
from training.harness.kept import harness_files, read_harness
from training.retrieval.kept import read_retrieval, retrieval_files

TABLE_COLUMNS = (
    *("step", "checkpoint", "text", "protocol", "length", "x_trained", "scored_tokens", "loss", "standard_error"),
    *("perplexity", "word_perplexity", "bits_per_byte", "attention_density", "precision", "date"),
)


HARNESS_COLUMNS = (
    *("step", "checkpoint", "task", "metric", "filter", "value", "stderr", "version", "fewshot", "samples", "limit"),
    *("max_length", "precision", "date"),
)
RETRIEVAL_COLUMNS = (
    *("step", "checkpoint", "text", "task", "length", "x_trained", "depth", "prompts", "recall", "recall_low"),
    *("recall_high", "choice", "choice_low", "choice_high", "log_probability", "margin", "seed", "precision", "date"),
)


def evaluation_table(folder: Path, *, label: str) -> dict[str, Any]:
    """Return all results of a text in one table: a row per checkpoint, protocol with scale, and length, in this order.

    So checkpoints of a run compare within the table; it has the same path in every run, by which MLflow compares runs.

    Args:
        folder: RUN_DIR/evaluation.
        label: Label of the text and precision: the name of its reports.
    """
    files = [file for file in folder.glob(f"*/{label}.json") if not file.parent.name.startswith(OTHER_MODEL)]
    return _table(TABLE_COLUMNS, [row for file in files for row in _evaluation_rows(file)])


def harness_table(folder: Path) -> dict[str, Any]:
    """Return all results of `harness` in one table: a row per checkpoint, task and metric.

    Args:
        folder: RUN_DIR/evaluation.
    """
    return _table(HARNESS_COLUMNS, [row for file in harness_files(folder) for row in _harness_rows(file)])


def retrieval_table(folder: Path, *, label: str) -> dict[str, Any]:
    """Return all results of `retrieval` on a text in one table: a row per checkpoint, task, length and depth.

    Args:
        folder: RUN_DIR/evaluation.
        label: Label of the text and precision: the name of its reports.
    """
    files = retrieval_files(folder, label=label)
    return _table(RETRIEVAL_COLUMNS, [row for file in files for row in _retrieval_rows(file)])


def table_event(path: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the event that logs a table.

    Args:
        path: The artifact's path in the run.
        table: Its `columns`, and its rows as `data`.
    """
    return {"kind": "table", "artifact": path, "table": table}


def _table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return a table of rows, those of an earlier checkpoint first; what a row lacks is empty."""
    ordered = sorted(rows, key=lambda row: (row["step"], row["checkpoint"]))
    return {"columns": [*columns], "data": [[row.get(column) for column in columns] for row in ordered]}


def _evaluation_rows(file: Path) -> Iterable[dict[str, Any]]:
    with suppress(InputError):  # it is broken: `evaluate` says so
        report = read_report(file)
        for result in sorted(report["results"], key=result_key):
            yield {
                **result,
                "step": report["step"],
                "checkpoint": Path(report["checkpoint"]).name,
                "text": report["data"]["name"],
                "protocol": protocol_name(result),
                "x_trained": result["length"] / report["train_length"],
                "scored_tokens": result.get("tokens"),
                "precision": report.get("precision"),
            }


def _harness_rows(file: Path) -> Iterable[dict[str, Any]]:
    with suppress(InputError):  # it is broken: `harness` moves it aside
        report = read_harness(file)
        for result in report["results"]:
            yield {**result, "step": report["step"], "checkpoint": Path(report["checkpoint"]).name}


def _retrieval_rows(file: Path) -> Iterable[dict[str, Any]]:
    with suppress(InputError):  # it is broken: the next measurement replaces it
        report = read_retrieval(file)
        for result in report["results"]:
            intervals = {key: result[f"{key}_interval"] for key in ("recall", "choice")}
            yield {
                **result,
                **{f"{key}_low": low for key, (low, _) in intervals.items()},
                **{f"{key}_high": high for key, (_, high) in intervals.items()},
                "step": report["step"],
                "checkpoint": Path(report["checkpoint"]).name,
                "text": report["data"]["name"],
                "x_trained": result["length"] / report["train_length"],
                **{key: report[key] for key in ("seed", "precision", "date")},
            }
