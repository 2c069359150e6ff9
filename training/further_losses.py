"""The fields of metrics.jsonl that hold further losses of validations: at other lengths, and of each source.

Their names hold the length or the source, so that a reader finds them whatever the run file of a later start says.
"""

from collections.abc import Iterable

PREFIX = "validation_loss_"  # of all these fields
_AT_LENGTH, _OF_SOURCE = f"{PREFIX}at_", f"{PREFIX}of_"


def loss_at(length: int) -> str:
    """Return the field of the loss at a length other than the training length."""
    return f"{_AT_LENGTH}{length}"


def loss_of(source: str) -> str:
    """Return the field of the loss on the held-out text of a source."""
    return f"{_OF_SOURCE}{source}"


def fields_by_length(fields: Iterable[str]) -> dict[int, str]:
    """Return those of some fields that are of a length, by length in ascending order."""
    lengths = [field.removeprefix(_AT_LENGTH) for field in fields if field.startswith(_AT_LENGTH)]
    return {length: loss_at(length) for length in sorted(int(text) for text in lengths if text.isdecimal())}


def fields_by_source(fields: Iterable[str]) -> dict[str, str]:
    """Return those of some fields that are of a source, by source."""
    return {field.removeprefix(_OF_SOURCE): field for field in fields if field.startswith(_OF_SOURCE)}
