"""The starts of a run on its page: their steps, those that were lost, and their saves, on one time line."""

from pathlib import Path

from tests.support.started_runs import certificate, write_lines
from training.comparison.run import STEP_FIELDS
from training.metrics_reader import STEP_TIMES
from training.page.starts import RunStart, read_starts
from training.page.timeline import draw_timeline
from training.step_columns import StepColumns


def test_all_saves_that_failed_between_two_steps_are_marked() -> None:
    lines = [{"step": step, "step_seconds": 1.0} for step in range(1, 7)]
    lines[2] |= {"save_seconds": 0.5}
    lines[4] |= {"save_seconds": 0.5, "failed_saves": 2}  # in the background one failed, and the next to begin
    lines[5] |= {"failed_saves": 2}
    steps = StepColumns(("step", *STEP_TIMES, "failed_saves"), lines)
    marks = [*RunStart({}, 0, steps=steps).saves()]
    assert marks == [(2.5, 2, "saved"), (5.0, 4, "failed"), (5.0, 4, "failed")]


def test_a_thousand_starts_stay_on_the_time_line(tmp_path: Path) -> None:
    steps = StepColumns(STEP_FIELDS, [{"step": step, "step_seconds": 1.0} for step in range(1, 1001)])
    write_lines(tmp_path / "certificates.jsonl", [certificate(step=step, minute=1) for step in range(1000)])
    timeline = draw_timeline(read_starts(tmp_path, steps), run_dir=tmp_path)
    lefts = [bar.left for bar in timeline.bars]
    assert lefts == sorted(lefts)
    assert min(bar.width for bar in timeline.bars) > 0
    assert (lefts[0], round(timeline.bars[-1].left + timeline.bars[-1].width, 6)) == (0.0, 100.0)


def test_lost_steps_belong_to_the_start_that_took_them(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0, "step_seconds": 1.0} for step in range(1, 21)]
    # the second start lost 9 to 12 too, the third found its newest checkpoint broken
    groups = [steps[4:10], steps[8:12], steps[2:6]]
    write_lines(tmp_path / "logs" / "metrics_discarded.jsonl", [line for group in groups for line in group])
    starts = [certificate(step=step, minute=step) for step in (0, 4, 8)]
    starts += [certificate(step=2, minute=30), certificate(step=8, minute=40, refused="why")]
    write_lines(tmp_path / "certificates.jsonl", starts)
    read = read_starts(tmp_path, StepColumns(STEP_FIELDS, steps))
    assert [start.steps.known("step") for start in read] == [[1, 2], [], [], [*range(3, 21)], []]
    assert [start.lost.known("step") for start in read] == [
        [3, 4, *range(5, 11)],
        [5, 6, *range(9, 13)],
        [],
        [],
        [],
    ]


def test_lost_steps_are_drawn_when_they_were_taken(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0, "step_seconds": 2.5} for step in range(1, 11)]
    # twice the start went back to step 3, then once to step 8
    groups = [steps[3:6], steps[3:5], steps[8:9]]
    lost = [{**line, "save_seconds": 2.5, "rolled_back": 1} for group in groups for line in group]
    write_lines(tmp_path / "logs" / "metrics_discarded.jsonl", lost)
    write_lines(tmp_path / "certificates.jsonl", [certificate(step=0, minute=1)])
    (start,) = read_starts(tmp_path, StepColumns(STEP_FIELDS, steps))
    bars = [(round(bar.width * 0.55, 6), bar.is_lost) for bar in draw_timeline([start], run_dir=tmp_path).bars]
    assert bars == [(7.5, False), (15.0, True), (10.0, True), (12.5, False), (5.0, True), (5.0, False)]
    assert [(at, step) for at, step, _ in start.saves()] == [(10, 3), (15, 4), (20, 5), (25, 3), (30, 4), (47.5, 8)]


def test_lost_steps_that_follow_others_are_drawn_apart(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0, "step_seconds": 1.0} for step in range(1, 11)]
    # back from 6 to 4, then from 8 to 6; the second start found no step after 8
    groups = [({"rolled_back": 1}, steps[4:6]), ({"rolled_back": 1, "rollbacks": 1}, steps[6:8])]
    groups.append(({"rollbacks": 2}, steps[8:]))
    lost = [{**line, **more} for more, group in groups for line in group]
    write_lines(tmp_path / "logs" / "metrics_discarded.jsonl", lost)
    write_lines(tmp_path / "certificates.jsonl", [certificate(step=step, minute=1 + step) for step in (0, 8)])
    first, second = read_starts(tmp_path, StepColumns(STEP_FIELDS, steps))
    stretches = [(stretch.is_lost, stretch.steps.known("step")) for stretch in first.stretches]
    assert stretches == [
        (False, [1, 2, 3, 4]),
        (True, [5, 6]),
        (False, [5, 6]),
        (True, [7, 8]),
        (False, [7, 8]),
        (True, [9, 10]),
    ]
    assert [(stretch.is_lost, stretch.steps.known("step")) for stretch in second.stretches] == [(False, [9, 10])]
