"""Reading metrics.jsonl, whatever a crash left in it."""

import json
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.paths import metrics_path
from training.metrics_reader import newest_step, newest_values, read_steps, step_fields

WHOLE = b'{"step": 1, "loss": 3.5, "validation_loss": 4.0}\n'


def test_only_whole_lines_are_steps() -> None:
    assert step_fields(WHOLE) == {"step": 1, "loss": 3.5, "validation_loss": 4.0}
    assert step_fields(b'{"step": 2, "loss": NaN}\n'), "a run may diverge"
    assert step_fields(WHOLE.replace(b"\n", b"\r\n")), "an editor may have changed the line's end"
    damaged = (WHOLE[:-1], b"", b"\n", b"\0\n", b"\xff\n", b"[]\n", b'"x"\n', b"{}\n", WHOLE[3:])
    wrong = (b'{"step": 1.0}\n', b'{"step": true}\n', b'{"step": "1"}\n', b'{"step": 1, "loss": "3"}\n')
    for line in (*damaged, *wrong, b"[" * 100_000 + b"\n"):
        assert step_fields(line) is None, line


def test_damage_between_steps_is_skipped(tmp_path: Path) -> None:
    assert [*read_steps(tmp_path)] == []
    assert newest_step(tmp_path) == {}
    later = b'{"step": 2, "loss": 3.0, "validation_loss": NaN}\n{"step": 3, "loss": 2.0}\n'
    metrics_path(tmp_path).write_bytes(
        b"\0" * 99 + b"\n" + WHOLE + b'{"step": 2, "lo\n' + later + b"\xff\n" + WHOLE[:9]
    )
    assert [step["step"] for step in read_steps(tmp_path)] == [1, 2, 3]
    assert newest_step(tmp_path)["step"] == 3
    assert newest_values(tmp_path, "validation_loss") == [4.0]
    metrics_path(tmp_path).write_bytes(b"\0" * 99)
    assert ([*read_steps(tmp_path)], newest_step(tmp_path)) == ([], {})


def test_the_end_of_a_long_file_is_enough(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 2.0, "validation_loss": float(step)}) for step in range(1, 40_001)]
    metrics_path(tmp_path).write_text("\n".join([*lines, ""]))
    assert newest_step(tmp_path)["step"] == 40_000
    values = newest_values(tmp_path, "validation_loss")
    assert values == [float(step) for step in range(40_001 - len(values), 40_001)]
    assert 10_000 < len(values) < 40_000
    assert len([*read_steps(tmp_path)]) == 40_000


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    metrics_path(tmp_path).mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read \(Is a directory\): "):
        newest_step(tmp_path)
