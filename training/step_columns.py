"""Fields of the steps of a run as columns: a run of months has a million steps. Imports no torch."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeAlias

_STEPS_AT_ONCE = 1024

# A number with a point takes 8 bytes, and nan stands for none. A column with anything else has what stands in the file.
_Column: TypeAlias = "array[float] | list[Any]"


class StepColumns:
    """Some fields of many steps, in a tenth of the memory of a dictionary per step.

    A value is None where the step lacks the field, or where it is no finite number: a diverged run has nan.
    """

    def __init__(self, fields: Sequence[str], steps: Iterable[Mapping[str, Any]] = (), *, prefix: str = "") -> None:
        """Take the fields out of each step.

        Args:
            fields: The fields, at least one.
            steps: All fields of each step.
            prefix: How the names of further fields begin; none unless given.
        """
        self._columns: dict[str, _Column] = {field: array("d") for field in fields}
        rest = iter(steps)
        while some := [*islice(rest, _STEPS_AT_ONCE)]:
            before = len(self)
            for name in dict.fromkeys(chain.from_iterable(some)) if prefix else ():
                if name.startswith(prefix):
                    self._columns.setdefault(name, array("d", [math.nan]) * before)
            for field, column in self._columns.items():
                self._columns[field] = _extended(column, [step.get(field) for step in some])

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields, with those that were found by their prefix."""
        return tuple(self._columns)

    def values(self, field: str) -> Iterator[float | None]:
        """Yield the value of a field of each step."""
        column = self._columns[field]
        if isinstance(column, array):
            return (value if math.isfinite(value) else None for value in column)
        return map(_finite, column)

    def last(self, field: str) -> float | None:
        """Return the value of a field of the last step; None if there is no step."""
        return _finite(self._columns[field][-1]) if self else None

    def known(self, field: str) -> list[float]:
        """Return the values of a field of the steps that have it."""
        return [value for value in self.values(field) if value is not None]

    def rows(self, *fields: str) -> Iterator[tuple[float | None, ...]]:
        """Yield the values of several fields of each step."""
        return zip(*map(self.values, fields), strict=True)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """Return the values of two fields of the steps that have both."""
        pairs = zip(self.values(x), self.values(y), strict=True)
        return [(first, second) for first, second in pairs if first is not None and second is not None]

    def chosen(self, numbers: Sequence[int], *, fields: Sequence[str]) -> "StepColumns":
        """Return some fields of some steps.

        Args:
            numbers: Places of the steps, the first is 0.
            fields: The fields.
        """
        chosen = StepColumns(fields)
        for field in fields:
            column = self._columns[field]
            values = map(column.__getitem__, numbers)
            chosen._columns[field] = array("d", values) if isinstance(column, array) else [*values]
        return chosen


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _extended(column: _Column, values: list[Any]) -> _Column:
    """Return a column with further values."""
    kinds = {*map(type, values)}
    if isinstance(column, array) and not kinds <= {float, type(None)}:
        column = [*column]
    if isinstance(column, array) and kinds != {float}:
        values = [math.nan if value is None else value for value in values]
    column.extend(values)
    return column
