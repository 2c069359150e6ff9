"""Progress of a run: its lines fit a terminal, are the same in the log, and count time honestly."""

import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from configs.backends import BACKENDS
from configs.errors import InputError
from configs.figures import duration, scaled
from configs.load import dump_run
from configs.paths import config_file
from configs.positions import POSITIONS
from configs.slow_parts import timed
from launch.show.train import train_command_line
from tests.support.progress import progress_run, ready_to
from tests.support.steps import step_result
from training.folder import with_fixed_keys
from training.metrics_file import Best, MetricsFile, last_reported_step
from training.observers import Save
from training.pace import Pace, Spent
from training.progress_lines import (
    build_line,
    closing_lines,
    live_line,
    lost_lines,
    save_line,
    start_lines,
    step_line,
    validation_lines,
    verified_line,
)
from training.progress_log import ProgressLog

HUGE = step_result(
    step=100_000,
    loss=10.8254,
    learning_rate=6e-4,
    grad_norm=123.456,
    model_flops_utilization=0.4512,
    model_flops_utilization_causal=0.4456,
    memory_gb=1061.3,
)


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal_with_any_numbers(columns: int) -> None:
    for speed, left in ((1_234_567.0, 99.0 * 86400), (9.87, 3.0), (987_654_321.0, 100_000.0)):
        line = step_line(HUGE, steps=1_000_000, speed=speed, seconds_left=left, columns=columns)
        assert len(line) <= columns
        assert line.startswith("step 100000/1000000 ")
        for figure in ("loss 10.83", "lr 6.0e-4", f" {scaled(speed)} tok", " 1.06 TB ", "MFU 45%", duration(left)):
            assert figure in line
        for doing in ("", "validating", "saving"):
            live = live_line(HUGE, steps=1_000_000, speed=speed, seconds_left=left, doing=doing, columns=columns)
            assert len(live) < columns, "a terminal may wrap at its last column"
            assert live.startswith("step 100000/1000000 ")
            assert live.endswith(doing or "left")
        assert ("grad 123 " in line) == (columns == 120), "the gradient norm is there if it fits"


def test_a_line_in_a_file_is_whole_without_what_is_unknown() -> None:
    line = step_line(step_result(), steps=9, speed=640.0, seconds_left=0.0, columns=None)
    assert line == "step 1/9  loss 2.000  lr 1.0e-3  grad 0.500  640 tokens/s  1.00 GB  MFU 25%  0.0 s left"
    for utilization in (None, 0.0, 0.0049, 0.0099):
        unknown = step_result(model_flops_utilization=utilization, loss=float("nan"))
        line = step_line(unknown, steps=9, speed=36_749.0, seconds_left=5000.0, columns=None)
        assert line == "step 1/9  loss nan  lr 1.0e-3  grad 0.500  36.7k tokens/s  1.00 GB  1h23m left"


def test_slow_work_is_said_before_it_begins() -> None:
    sdpa = BACKENDS["sdpa"]
    assert build_line(sdpa, draws=True) == "building the model, drawing its weights, checking its positions"
    assert build_line(sdpa, draws=False) == "building the model, checking its positions"
    compiled = build_line(BACKENDS["flex"], draws=True)
    assert compiled.endswith("; the attention kernel (flex) is compiled, which takes minutes")


def test_a_part_of_the_start_is_told_if_it_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, 4.7, 10.0, 10.9])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with timed("drew 1,361,987,584 initial weights", say=lambda text, *words: said.append(text % words)):
            pass
    assert said == ["drew 1,361,987,584 initial weights in 4.7 s"]


def test_the_positions_are_named_once_they_are_verified() -> None:
    said = {
        name: verified_line([Mock(position=name, backend="sdpa", precision="bf16")] * 8, device="H100")
        for name in POSITIONS
    }
    assert said["alibi"] == "ALiBi verified on 8 ranks: attention sdpa, bf16, H100"
    assert said["sinusoidal"].startswith("sinusoidal positions verified on 8 ranks: ")
    assert all(len(line) <= 80 and not line.startswith(" ") for line in said.values())


def test_how_often_lines_come_may_change_between_starts(tmp_path: Path) -> None:
    first = progress_run(f"run.dir={tmp_path}", "train.log_every=1", "train.steps=9")
    config_file(tmp_path).write_text(dump_run(first), encoding="utf-8")
    for key, every in (("train.log_every=50", 50), ("train.log_every=null", None)):
        again = progress_run(f"run.dir={tmp_path}", key, "train.steps=9")
        assert with_fixed_keys(again, run_dir=tmp_path).train.log_every == every
    with pytest.raises(InputError, match="train.log_every"):
        progress_run("train.log_every=0")


def test_validation_and_save_lines_say_what_matters(tmp_path: Path) -> None:
    best = Best(4.0, 80)
    first, second = (step_result(step=80, validation_seconds=2.3), step_result(step=90, validation_seconds=75.0))
    assert validation_lines(first, loss=4.0, best=best) == [
        "validation at step 80: loss 4.0000, the best so far (2.3 s)"
    ]
    further = replace(second, validation_by_length={512: 4.2, 1024: 4.25}, validation_by_source={"a.txt": 5.0})
    assert validation_lines(further, loss=4.1, best=best) == [
        "validation at step 90: loss 4.1000, best 4.0000 at step 80 (75 s)",
        "loss by length: 4.2000 at 512, 4.2500 at 1,024 tokens",
        "loss of a.txt: 5.0000",
    ]
    assert "loss nan (75 s)" in validation_lines(second, loss=float("nan"), best=None)[0]
    save = Save(80, Path("runs/my/checkpoints/step_0000080"), 0.42)
    assert save_line(save, size_bytes=1_234_567) == "saved step 80: runs/my/checkpoints/step_0000080 (1.23 MB in 0.4 s)"
    assert lost_lines(last_step=130, checkpoint=save.folder, saved_step=80) == [
        "ended without saving: steps 81 to 130 are lost",
        f"{save.folder} stays",
    ]
    assert "step 81 is lost" in lost_lines(last_step=81, checkpoint=save.folder, saved_step=80)[0]
    assert lost_lines(last_step=0, checkpoint=None, saved_step=0) == [
        "ended without saving: no finished step is lost, there is no checkpoint"
    ]
    lines = [
        *lost_lines(last_step=9_999_999, checkpoint=save.folder, saved_step=1_000_000),
        *lost_lines(last_step=9_999_999, checkpoint=None, saved_step=0),
    ]
    assert max(map(len, lines)) <= 80


def test_the_end_says_where_the_time_went() -> None:
    spent = Spent(total=100.0, training=64.0, validation=20.0, saving=10.0)
    lines = closing_lines(steps=10, tokens=64_000, spent=spent, memory_gb=1.5, best=Best(4.05, 8))
    assert lines == [
        "total 1m40s: training 64 s, validation 20 s, saving 10 s, other 6.0 s",
        "10 steps at 1.00k tokens/s (training alone), peak memory 1.50 GB",
        "best validation: loss 4.0500 at step 8",
    ]
    assert len(closing_lines(steps=1, tokens=1, spent=spent, memory_gb=1.5, best=None)) == 2


def test_the_start_says_what_is_to_go(tmp_path: Path) -> None:
    run = progress_run("train.steps=400", "run.dir=runs/my")
    date, *lines = start_lines(ready_to(run, world_size=4), device="cpu")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  demo in runs/my", date)
    assert lines[0].endswith(" parameters; 400 steps, 410k tokens in all")
    assert lines[1:] == [
        "to go: 400 steps, 410k tokens, 1,024 a step",
        "4 CPU ranks: tensor 2 x pipeline 2 x data 1, ZeRO-1, fp32",
        "attention sdpa, lossless windows: all scores at length 64",
    ]
    assert all(len(line) <= 80 for line in [date, *lines])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("model.heads=8", "sdpa, lossless windows: about 0.84 of the scores"),
        ("train.precision=bf16", "sdpa, lossless windows: about 0.81 of the scores"),
        ("model.windows=off", "sdpa, windows off"),
        ("model.attention=reference", "reference"),
        ("model.position=rotary", "sdpa"),
        ("model.position=rotary model.window=256", "sdpa, window 256: at least 0.69 of the scores"),
        ("model.window=256", "sdpa, window 256: at least 0.69 of the scores"),
        ("data.mask_documents=true", "sdpa, lossless windows, documents masked"),
        ("data.mask_documents=true model.position=t5", "sdpa, documents masked"),
        ("model.window=9 data.sequence_length=64", "sdpa, window 9"),
        ("model.window=99 data.sequence_length=64", "sdpa, window 99, lossless windows: all scores at length 64"),
        ("model.window=256 model.windows=off", "sdpa, window 256, windows off: at least 0.69 of the scores"),
    ],
)
def test_the_start_says_what_attention_leaves_out(keys: str, words: str) -> None:
    run = progress_run("data.sequence_length=1024", *keys.split())
    line = start_lines(ready_to(run, world_size=4), device="cpu")[-1]
    assert line == f"attention {words}"
    assert len(line) <= 80


def test_a_step_says_what_it_left_out_if_that_fits() -> None:
    result = step_result(attention_density=0.414)
    line = step_line(result, steps=9, speed=640.0, seconds_left=0.0, columns=None)
    assert line == "step 1/9  loss 2.000  lr 1.0e-3  grad 0.500  scores 41%  640 tokens/s  1.00 GB  MFU 25%  0.0 s left"
    for density, columns in ((0.414, 90), (0.996, None), (1.0, None), (None, None)):
        result = step_result(attention_density=density)
        assert step_line(result, steps=9, speed=640.0, seconds_left=0.0, columns=columns) == line.replace(
            "scores 41%  ", ""
        )


LONGER = ("evaluate.validation_lengths=[1024]", "data.sequence_length=128")


def test_the_time_left_counts_validations_and_saves() -> None:
    run = progress_run("train.steps=100", "evaluate.every=10", "evaluate.samples=16", "checkpoint.every=30")
    pace, now = Pace(run, step=0), 100.0
    pace.on_step(1, seconds=9.0, now=now)
    assert pace.seconds_left == pytest.approx(99 * 9.0 + 10 * 3.0), "a validation is a third of a step until measured"
    longer = Pace(progress_run("train.steps=100", "evaluate.every=100", "evaluate.samples=16", *LONGER), step=0)
    longer.on_step(1, seconds=9.0, now=now)
    work = (
        longer.seconds_left - 99 * 9.0
    ) / 3.0  # in that of 16 sequences of 128 tokens, twice with 8 times the tokens
    assert 16.5 < work < 20, "a token of 1,024 takes more time"
    for step in range(2, 31):
        validation = 5.0 if step % 10 == 0 else None
        now += 2.0 + (validation or 0.0)  # 1 s of the step, and 1 s between two steps
        pace.on_step(step, seconds=1.0, validation_seconds=validation, now=now)
    pace.on_save(7.0)
    now += 7.0
    assert pace.seconds_left == pytest.approx(70 * 2.0 + 7 * 5.0 + 3 * 7.0), "the first step warms up: it is left out"
    pace.on_step(31, seconds=1.0, now=now + 2.0)
    assert pace.step_seconds == pytest.approx(2.0), "a save does not count as time of a step"
    spent = pace.spent()
    assert (spent.training, spent.validation, spent.saving) == (9.0 + 30.0, 15.0, 7.0)
    assert pace.steps_taken == 31


def logged_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines since the last call."""
    lines = [record.getMessage() for record in caplog.records if record.name == "training.progress_log"]
    caplog.clear()
    return lines


def test_a_line_every_so_many_steps_and_none_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = progress_run("train.steps=7", "train.log_every=3", "evaluate.every=2", "checkpoint.every=5")
    progress = ProgressLog(run, first_step=0, best=None, terminal=None)
    for step, loss in enumerate((None, 5.0, None, 4.0, None, float("nan"), None), start=1):
        progress.on_step(step_result(step=step, validation_loss=loss, validation_seconds=loss and 1.5))
        if step in (5, 7):
            progress.before_save()
            progress.on_save(Save(step, tmp_path / f"step_000000{step}", 0.2))
    kinds = [re.sub(r"(\d)[:/].*", r"\1", line) for line in logged_lines(caplog)]
    assert kinds == [
        *("validation at step 2", "step 3", "validation at step 4", "saved step 5", "step 6", "validation at step 6"),
        *("step 7", "saved step 7"),
    ]
    progress.close("FINISHED")
    total, steps, best = logged_lines(caplog)
    assert total.startswith("total ")
    assert steps.startswith("7 steps at 10.2k tokens/s")
    assert best == "best validation: loss 4.0000 at step 4"


def test_speed_and_utilization_are_of_the_same_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = ProgressLog(progress_run("train.steps=9", "train.log_every=2"), first_step=0, best=None, terminal=None)
    for step, seconds, work in ((1, 0.1, 0.04), (2, 0.3, 0.12)):  # the second is of longer sequences
        speed = 1024 / seconds
        result = step_result(step=step, step_seconds=seconds, tokens_per_second=speed)
        progress.on_step(replace(result, model_flops_utilization=work / seconds))
    (line,) = logged_lines(caplog)
    assert "  5.12k tokens/s  1.00 GB  MFU 40%  " in line


def test_a_stop_shows_its_last_step_and_a_slow_run_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        clock = iter(range(0, 1000, 4))
        patch.setattr("training.progress_log.time.monotonic", lambda: float(next(clock)))
        progress = ProgressLog(progress_run("train.steps=9"), first_step=0, best=None, terminal=None)
        for step in range(1, 6):
            progress.on_step(step_result(step=step))
    assert [line.split("/")[0] for line in logged_lines(caplog)] == ["step 1", "step 4"], "a line every 10 s"
    progress.before_save()
    progress.on_save(Save(5, tmp_path, 0.2))
    progress.close("KILLED")
    assert [line.partition(" ")[0] for line in logged_lines(caplog)] == ["step", "saved", "total", "5"]
    ProgressLog(progress_run(), first_step=0, best=None, terminal=None).close("KILLED")
    assert logged_lines(caplog) == [], "a start that took no step has no summary"


def test_the_best_validation_is_that_of_all_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert last_reported_step(tmp_path) == 0
    first = MetricsFile(tmp_path, last_step=0)
    assert first.best is None
    for step, loss in ((1, 4.0), (2, float("nan")), (3, 5.0), (4, 3.0)):
        first.on_step(step_result(step=step, validation_loss=loss))
    first.close("KILLED")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert last_reported_step(tmp_path) == 4, "a torn line is no step"
    again = MetricsFile(tmp_path, last_step=3)
    assert again.best == Best(4.0, 1), "step 4 comes again"
    again.close("KILLED")
    progress = ProgressLog(progress_run(), first_step=3, best=again.best, terminal=None)
    progress.on_step(step_result(step=4, validation_loss=4.5, validation_seconds=1.0))
    assert "validation at step 4: loss 4.5000, best 4.0000 at step 1 (1.0 s)" in logged_lines(caplog)


def test_a_rollback_forgets_what_was_measured_after_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = progress_run("train.steps=9", "train.log_every=100", "evaluate.every=2", f"run.dir={tmp_path}")
    metrics = MetricsFile(tmp_path, last_step=0)
    log = ProgressLog(config, first_step=0, best=None, terminal=None)

    def validate(step: int, loss: float) -> None:
        for observer in (metrics, log):
            observer.on_step(step_result(step=step, validation_loss=loss, validation_seconds=1.0))

    for step, loss in ((2, 3.0), (4, 2.0)):
        validate(step, loss)
    for observer in (metrics, log):
        observer.on_rollback(3)
    validate(4, 3.5)
    log.close("FINISHED")
    assert "validation at step 4: loss 2.0000, the best so far" in caplog.text
    assert "validation at step 4: loss 3.5000, best 3.0000 at step 2" in caplog.text
    assert caplog.messages[-1] == "best validation: loss 3.0000 at step 2"


def test_the_command_that_continues_is_the_users_own() -> None:
    overrides = ["train.steps=20", "run.name=a b", "track.uri=https://me:hunter2@mlflow.example"]
    line = train_command_line("my.yaml", options=["--ranks", "2"], overrides=overrides)
    assert line.startswith("trainshort train my.yaml --ranks 2 --set train.steps=20 --set 'run.name=a b' --set ")
    assert "hunter2" not in line
    assert train_command_line("-x.yaml", options=[], overrides=[]) == "trainshort train ./-x.yaml"
