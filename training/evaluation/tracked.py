"""The values of an evaluation as trackers get them. Imports no torch."""

from typing import Any

from training.evaluation.results import protocol_name

_MEASURED = ("loss", "perplexity", "bits_per_byte", "standard_error", "attention_density")


def tracked_values(report: dict[str, Any], *, label: str) -> dict[str, float]:
    """Return a report's values by their names in MLflow: one per text, protocol and length, and of its verdict.

    Args:
        report: The contents of report.json.
        label: The report's label: its text and precision.
    """
    values = dict[str, float]()
    for result in report["results"]:
        name = f"evaluation/{label}/{tracked_protocol(result)}/{result['length']}"
        values |= {f"{name}/{key}": result[key] for key in _MEASURED if key in result}
    verdict = report.get("verdict") or {}  # reports of earlier versions have none
    found = {key: verdict.get(key) for key in ("usable_length", "effective_context")}
    return values | {f"evaluation/{label}/{key}": value for key, value in found.items() if value is not None}


def tracked_protocol(result: dict[str, Any]) -> str:
    """Return the protocol of a result in a name."""
    return protocol_name(result).replace(":", "_")  # MLflow does not allow a colon in a name on every system
