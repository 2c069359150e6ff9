"""What a result of a report was measured with, and how it is shown. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

Result = dict[str, Any]
"""An entry of a report's `results`."""

# what `compare` and a study say where two results of one text, protocol and length are of different tokens
DIFFERENT_TOKENS = (
    "the runs scored different tokens, which alone moves a perplexity: evaluate all with the same --lengths, and all "
    "or none with --same-tokens"
)


def result_key(result: Result) -> tuple[str, int, int]:
    """Return what a result was measured with: protocol and scale, the protocol's number (0 if it has none) and length.

    Sorted by it, results stand as in a table.
    """
    number = {"sliding": result["stride"], "last": result.get("scored", 0)}.get(result["protocol"], 0)
    return f"{result['protocol']}{with_scale(result)}", number, result["length"]


def protocol_name(result: Result) -> str:
    """Return protocol and scale of a result as on the command line.

    So nonoverlapping, sliding:STRIDE or last:TOKENS, and behind a space the scale if there is one.
    """
    _, number, _ = result_key(result)
    return f"{result['protocol']}{f':{number}' if number else ''}{with_scale(result)}"


def with_scale(result: Result) -> str:
    """Return a space and the scale of a result; empty if its positions were not scaled."""
    return f" {result['scale']}" if "scale" in result else ""


def is_whole(result: Result, *, scale: str | None = None) -> bool:
    """Return whether a result is of windows that do not overlap, with this scale; None for positions as trained.

    Only such results compare lengths: a model with another scale is another model.
    """
    return bool(result["protocol"] == "nonoverlapping") and result.get("scale") == scale


@dataclass(frozen=True)
class Change:
    """The difference of a result's loss from that of its protocol's shortest length.

    Attributes:
        loss: Difference in nats.
        error: Its standard error, from draws of the same units in both.
    """

    loss: float
    error: float


def changes(results: Sequence[Result]) -> Iterator[tuple[Result, Change | None]]:
    """Yield each result with its difference; None for the shortest length, and where the draws are not known."""
    shortest: dict[tuple[str, int], Result] = {}
    for result in sorted(results, key=result_key):
        shortest.setdefault(result_key(result)[:2], result)
    for result in results:
        first = shortest[result_key(result)[:2]]
        drawn, from_first = result.get("draws", ()), first.get("draws", ())
        if result is first or not drawn or len(drawn) != len(from_first):
            yield result, None
        else:
            differences = [one - other for one, other in zip(drawn, from_first, strict=True)]
            yield result, Change(result["loss"] - first["loss"], stdev(differences))


def shown_density(result: Result) -> str:
    """Return the share of the scores that a result's attention computed; - if it was not counted."""
    return f"{result['attention_density']:.1%}" if "attention_density" in result else "-"


def shown_error(result: Result) -> str:
    """Return the standard error of a result's loss; - if no units of the text were drawn."""
    return f"{result['standard_error']:.4f}" if "standard_error" in result else "-"
