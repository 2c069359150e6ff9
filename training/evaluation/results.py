"""What a result of a report was measured with, and how it is shown. Imports no torch."""

from typing import Any

Result = dict[str, Any]
"""An entry of a report's `results`."""


def result_key(result: Result) -> tuple[str, int, int]:
    """Return what a result was measured with: protocol, its number (0 if it has none) and length.

    Sorted by it, results stand as in a table.
    """
    number = {"sliding": result["stride"], "last": result.get("scored", 0)}.get(result["protocol"], 0)
    return result["protocol"], number, result["length"]


def protocol_name(result: Result) -> str:
    """Return the protocol of a result as on the command line: nonoverlapping, sliding:STRIDE or last:TOKENS."""
    name, number, _ = result_key(result)
    return f"{name}:{number}" if number else name


def shown_density(result: Result) -> str:
    """Return the share of the scores that a result's attention computed; - if it was not counted."""
    return f"{result['attention_density']:.1%}" if "attention_density" in result else "-"


def shown_error(result: Result) -> str:
    """Return the standard error of a result's loss; - if no units of the text were drawn."""
    return f"{result['standard_error']:.4f}" if "standard_error" in result else "-"
