"""Columns of steps say what the steps themselves say, whatever their types."""

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from training.step_columns import StepColumns

FIELDS = ("step", "loss", "tokens_seen")
FLOATS = st.floats(allow_subnormal=False)  # a process in which a model has trained flushes them
VALUES = st.one_of(FLOATS, st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.text(max_size=2), st.just([1]))
STEPS = st.one_of(
    st.lists(st.dictionaries(st.sampled_from((*FIELDS, "other")), VALUES)),
    st.lists(st.fixed_dictionaries({"step": st.integers(0, 9)}, optional={"loss": FLOATS})),
)


def finite(value: Any) -> Any:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


@settings(max_examples=40)
@given(steps=STEPS, copies=st.sampled_from((1, 700)), chosen=st.lists(st.integers(0, 999)))
def test_columns_hold_what_each_step_says(steps: list[dict[str, Any]], copies: int, chosen: list[int]) -> None:
    steps = steps[:4] * copies + steps[4:]  # more than are read at once
    columns = StepColumns(FIELDS, iter(steps))
    assert (len(columns), bool(columns)) == (len(steps), bool(steps))
    rows = [tuple(finite(step.get(field)) for field in FIELDS) for step in steps]
    numbers = [number % len(steps) for number in chosen if steps]
    some = columns.chosen(numbers, fields=FIELDS[:2])
    for got, wanted in (
        ([*columns.rows(*FIELDS)], rows),
        ([*some.rows("loss", "step")], [(rows[number][1], rows[number][0]) for number in numbers]),
        (columns.points("step", "loss"), [row[:2] for row in rows if None not in row[:2]]),
        (columns.known("tokens_seen"), [row[2] for row in rows if row[2] is not None]),
        (columns.last("loss"), rows[-1][1] if rows else None),
    ):
        assert repr(got) == repr(wanted), "1, 1.0 and True are different"
    found = StepColumns(FIELDS[:1], iter(steps), prefix="oth")
    assert found.fields == (("step", "other") if any("other" in step for step in steps) else ("step",))
    others = [*found.values("other")] if len(found.fields) == 2 else [None] * len(steps)
    assert repr(others) == repr([finite(step.get("other")) for step in steps])
