"""`trainshort watch`: what it shows of a run, from files that grow, are replaced and are damaged."""

import ast
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import load_run
from configs.paths import config_file, incarnation_file, logs_folder, metrics_path
from launch.show.watch import curve_rows, watch_lines
from launch.watch import RunView, RunWatcher
from tests.support.command_line import Call, refused
from tests.support.house.source import sources_of
from tests.support.run_folders import make_run, start_run
from tests.support.steps import step_result
from training.appended_lines import AppendedLines
from training.followed_log import FollowedLog
from training.followed_metrics import CURVE_POINTS, Curve, FollowedMetrics
from training.pace import Pace

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
ENDED, ELSEWHERE = {"process_started": 1}, {"machine": "another", "host": "node7"}
START = "2026-11-26 21:51:38+00:00  my in runs/my"
TRACEBACK = ("Traceback (most recent call last):", '  File "a.py", line 1, in b', "    c()", "ValueError: d")
WIDTHS = (30, 40, 50, 60, 80, 120, 200)


def write_steps(run_dir: Path, first: int, last: int, **fields: Any) -> None:
    """Append the lines of steps whose loss falls."""
    with metrics_path(run_dir).open("a") as file:
        for step in range(first, last + 1):
            result = step_result(step=step, loss=8.0 - step / 100, tokens_seen=64 * step, **fields)
            file.write(json.dumps(asdict(result)) + "\n")


def write_log(run_dir: Path, *lines: str) -> None:
    logs_folder(run_dir).mkdir(exist_ok=True)
    with (logs_folder(run_dir) / "rank_0.log").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def make_old(run_dir: Path, *, seconds: float) -> None:
    """Let all files of a run be as if they were written so long ago."""
    then = time.time() - seconds
    for path in run_dir.rglob("*"):
        os.utime(path, (then, then))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 100 steps that runs here, has two checkpoints and has taken 40 steps."""
    run_dir = start_run(make_run(tmp_path / "runs" / "my", "run.name=my", steps=100, saved=(20, 40)))
    sizes = {"tensor": 2, "pipeline": 2, "data": 1, "zero": 1}
    (run_dir / "environment.json").write_text(json.dumps({"world_size": 4, "layout": sizes}))
    write_steps(run_dir, 1, 40)
    return run_dir


def picture(view: RunView, *, columns: int = 80) -> str:
    return "\n".join(line.plain.rstrip() for line in watch_lines(view, columns=columns))


def rows_of(view: RunView) -> dict[str, str]:
    """Return what follows each label of the picture."""
    lines = [line.split(maxsplit=1) for line in picture(view, columns=120).splitlines() if line]
    return {words[0]: words[1] for words in lines if len(words) == 2}


def test_a_running_run_shows_its_figures_in_any_width(run_dir: Path) -> None:
    write_steps(run_dir, 41, 41, validation_loss=7.5, validation_seconds=2.0, failed_saves=1, rollbacks=2)
    write_log(run_dir, START, "NOT SAVED: the disk is full; training continues", "step 41/100  loss 7.59")
    view = RunWatcher(run_dir).look()
    for width in WIDTHS:
        lines = picture(view, columns=width).splitlines()
        assert max(map(len, lines)) <= width
        for label in ("my in ", "running", "step 41/100", "loss", "validation", "lr", "grad norm", "checkpoint"):
            assert any(line.startswith(label) for line in lines), (label, width)
    rows = rows_of(view)
    assert rows["step"].startswith("41/100  41%  ")
    assert "left" in rows["step"]
    assert [rows[label].split()[0] for label in ("loss", "highest", "lowest")] == ["7.5900", "7.9900", "7.5900"]
    assert rows["validation"] == "7.5000  at 41; best 7.5000 at 41"
    assert rows["lr"].startswith("0.001")
    assert rows["tokens/s"].startswith("640")
    assert rows["MFU"] == "25.0%  causal 24.0%"
    assert rows["memory"] == "1.00 GB  peak, largest of 4 ranks"
    assert rows["4"] == "ranks: tensor 2 x pipeline 2 x data 1, ZeRO-1"
    assert rows["checkpoint"] == "step 40  now, 2 kept, 1 save of this start failed"
    assert rows["rollbacks"] == "2  training diverged and went back"
    assert rows["warnings"].startswith("1 ")
    assert rows["NOT"] == "SAVED: the disk is full; training continues"


def test_the_time_left_is_that_of_the_progress_log(run_dir: Path) -> None:
    config = load_run(str(config_file(run_dir)))
    pace = Pace(config, step=0)
    metrics_path(run_dir).unlink()
    for step in range(1, 31):
        seconds = 9.0 if step == 1 else 0.1  # the first step warms up
        pauses = {20: {"validation_seconds": 3.0, "validation_loss": 4.0}, 21: {"save_seconds": 2.0}}.get(step, {})
        write_steps(run_dir, step, step, step_seconds=seconds, **pauses)
        if step == 21:
            pace.on_save(2.0)
        now = 9.0 + step * 0.1 + 3.0 * (step >= 20) + 2.0 * (step >= 21)
        pace.on_step(step, seconds=seconds, validation_seconds=pauses.get("validation_seconds"), now=now)
    view = RunWatcher(run_dir).look()
    assert view.seconds_left == pytest.approx(pace.seconds_left)
    assert view.seconds_left is not None
    assert 7.0 < view.seconds_left < 40.0


def test_only_what_was_appended_is_read(run_dir: Path) -> None:
    metrics, path = FollowedMetrics(run_dir), metrics_path(run_dir)
    metrics.update()
    *read, _ = path.read_bytes().splitlines(keepends=True)
    with path.open("r+b") as file:  # the same file by its last line: what was read must not be read again
        file.write(b"\0" * len(b"".join(read)))
    write_steps(run_dir, 41, 42)
    with path.open("a") as file:
        file.write('{"step": 43, "loss": 7.')
    metrics.update()
    assert metrics.newest["step"] == 42
    assert len(metrics.curves["loss"].points(100)) == 42
    with path.open("a") as file:
        file.write("57}\n")
    metrics.update()
    assert (metrics.newest["step"], metrics.newest["loss"]) == (43, 7.57)


def test_a_file_that_is_replaced_or_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lines = AppendedLines(path)
    assert (lines.starts_over(), list(lines.read())) == (False, [])
    path.write_text("one\ntwo")
    assert (lines.starts_over(), list(lines.read())) == (True, [b"one\n"])
    path.write_text("x\n")
    assert (lines.starts_over(), list(lines.read())) == (True, [b"x\n"])
    (tmp_path / "new").write_text("longer than before\n")
    (tmp_path / "new").rename(path)
    assert (lines.starts_over(), list(lines.read())) == (True, [b"longer than before\n"])
    assert (lines.starts_over(), list(lines.read())) == (False, [])
    path.unlink()
    assert (lines.starts_over(), list(lines.read())) == (True, [])
    path.write_text("a long line\nand its end\n")
    end = AppendedLines(path, last_bytes=12)
    assert (end.starts_over(), list(end.read())) == (True, [b"and its end\n"])


def test_damaged_lines_are_passed_over(run_dir: Path) -> None:
    with metrics_path(run_dir).open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + (1 << 24))  # a hole
        file.seek(0, 2)
        file.write(b'\n{"step": 41, \xff}\n[]\n{"step": "41"}\n{"step": 41, "loss": NaN, "grad_norm": "high"}\n')
        file.write(b'{"step": 42, "loss": 5.0, "step_seconds": null, "validation_loss": NaN}\n{"step": 43, "lo')
    view = RunWatcher(run_dir).look()
    assert (view.step, view.newest["loss"]) == (42, 5.0)
    assert len(view.curves["loss"].points(100)) == 41
    assert view.seconds_left is not None
    shown = picture(view)
    assert "nan" in shown
    values = view.to_json()
    json.dumps(values, allow_nan=False)
    assert (values["loss"], values["validation_loss"], values["best_validation"]) == (5.0, None, None)


def test_a_curve_keeps_the_means_of_many_values() -> None:
    curve, values = Curve(), [float(n % 1000) for n in range(50_001)]
    for value in values:
        curve.add(value)
    points = curve.points(10 * CURVE_POINTS)
    assert CURVE_POINTS <= len(points) <= 2 * CURVE_POINTS
    assert points[0] == sum(values[:64]) / 64
    assert points[-1] == pytest.approx(sum(values[781 * 64 :]) / len(values[781 * 64 :]))
    assert len(curve.points(60)) == 60
    assert (curve.lowest, curve.highest) == (0.0, 999.0)
    assert Curve().points(60) == []


def test_curves_are_drawn_from_the_lowest_to_the_highest() -> None:
    assert curve_rows([0.0, 7.0, 3.5], rows=1, marks=" ▁▂▃▄▅▆▇█") == ["▁█▅"]
    assert curve_rows([0.0, 1.0], rows=2, marks=" ▁▂▃▄▅▆▇█") == [" █", "▁█"]
    assert curve_rows([0.3, 0.1 + 0.2], rows=1, marks=" .#") == [".."]
    assert curve_rows([], rows=1, marks=" .#") == [""]


def test_states_are_seen_from_the_files_alone(tmp_path: Path) -> None:
    def run(name: str, **start: object) -> Path:
        write_steps(folder := make_run(tmp_path / name, saved=(6,)), 1, 6)
        return start_run(folder, **start)

    folders = {
        "running": run("running"),
        "stopped": run("stopped", **ENDED),
        "failed": run("failed", **ENDED),
        "finished": start_run(make_run(tmp_path / "finished", last=10, saved=(10,)), **ENDED),
        "new": make_run(tmp_path / "new"),
        "running elsewhere": run("elsewhere", **ELSEWHERE),
        "silent elsewhere": run("silent", **ELSEWHERE),
        "stopped elsewhere": run("ended", **ELSEWHERE),
        "starting again": run("again", **ENDED),
        "failed again": run("failed again", **ENDED),
        "broke again": run("broke again", **ENDED),
    }
    write_steps(folders["failed"], 7, 7)
    write_log(folders["stopped elsewhere"], START, "stopped after step 6, saved: start again", "to continue: x")
    now = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime(time.time() + 2))
    write_log(folders["starting again"], START, "error: old", f"{now}  my in runs/my", "importing torch")
    write_log(folders["failed again"], f"{now}  my in runs/my", "error: out of memory", "  held: 2 GB", "  limit: 3 GB")
    write_log(folders["broke again"], f"{now}  my in runs/my", *TRACEBACK)
    make_old(folders["silent elsewhere"], seconds=400.0)
    make_old(folders["running"], seconds=400.0)
    views = {name: RunWatcher(folder).look() for name, folder in folders.items()}
    assert {name: view.state for name, view in views.items()} == {
        **{name: name for name in ("running", "stopped", "failed", "finished", "new")},
        "running elsewhere": "running",
        "silent elsewhere": "silent",
        "stopped elsewhere": "stopped",
        "starting again": "starting",
        "failed again": "stopped",
        "broke again": "stopped",
    }
    left = {name for name, view in views.items() if view.seconds_left is not None}
    assert left == {"running", "running elsewhere", "silent elsewhere", "starting again"}
    assert re.search(r"\nsilent for 6m4\ds  on node7", picture(views["silent elsewhere"]))
    assert re.search(r"\nrunning, silent for 6m4\ds  on ", picture(views["running"]))
    assert "silent" not in picture(views["running elsewhere"])


@pytest.mark.parametrize(
    ("background", "seconds", "state"),
    [("false", 0.1, "silent"), ("true", 0.1, "running"), ("false", 60.0, "running"), ("true", 60.0, "running")],
)
def test_the_last_save_of_the_background_may_take_long(
    tmp_path: Path, background: str, seconds: float, state: str
) -> None:
    # no pause before it tells how long it takes; slow steps count as before
    run_dir = make_run(tmp_path / "my", f"checkpoint.background={background}", steps=100, saved=(20,))
    start_run(run_dir, **ELSEWHERE)
    write_steps(run_dir, 1, 40, step_seconds=seconds)
    make_old(run_dir, seconds=200.0 if seconds < 1 else 400.0)
    assert RunWatcher(run_dir).look().state == state


@pytest.mark.parametrize(("samples", "state"), [(64, "silent"), (100_000, "running")])
def test_the_first_validation_may_take_long(tmp_path: Path, samples: int, state: str) -> None:
    keys = (f"evaluate.samples={samples}", "evaluate.every=40", "data.split=0.1")
    run_dir = start_run(make_run(tmp_path / "my", *keys, steps=100, saved=(20,)), **ELSEWHERE)
    write_steps(run_dir, 1, 39, step_seconds=0.1)
    make_old(run_dir, seconds=200.0)
    assert RunWatcher(run_dir).look().state == state


def test_a_run_before_its_first_step_shows_its_log(tmp_path: Path) -> None:
    run_dir = tmp_path / "my"
    run_dir.mkdir()
    write_log(run_dir, START, "importing torch and DeepSpeed")
    watcher = RunWatcher(run_dir)
    shown = picture(watcher.look())
    assert shown.startswith(f"a run in {run_dir}"[:79])
    assert "\nstarting  started 2026-11-26" in shown
    assert "importing torch and DeepSpeed" in shown
    assert "checkpoint       none" in shown
    config_file(run_dir).write_text(config_file(make_run(tmp_path / "other", steps=70)).read_text())
    write_steps(run_dir, 1, 1)
    assert "\nstep 1/70  1%  " in picture(watcher.look())


def test_a_restart_is_followed(run_dir: Path) -> None:
    write_log(
        run_dir, START, "logs/metrics.jsonl cannot be written (No space left on device): its lines wait in memory"
    )
    watcher = RunWatcher(run_dir)
    assert list(watcher.look().warnings) == [
        "logs/metrics.jsonl cannot be written (No space left on device): its lines wait in memory"
    ]
    (run_dir / "certificates.jsonl").write_text('{"step": 0}\n{"step": 20}\n')
    start_run(run_dir)
    metrics_path(run_dir).rename(run_dir / "before")
    write_steps(run_dir, 1, 20)
    write_steps(run_dir, 21, 21, step_seconds=50.0, tokens_per_second=1.0)  # warms up
    write_steps(run_dir, 22, 23)
    write_log(run_dir, START.replace("21:", "22:"), "accepted: other samples", "accepted: other samples", "step 23/100")
    view = watcher.look()
    assert (view.starts, view.began_after, view.newest["step"]) == (2, 20, 23)
    assert view.warnings == {"accepted: other samples": 2}
    assert view.tokens_per_second == pytest.approx(640.0)
    assert view.seconds_left is not None
    assert view.seconds_left < 60.0
    rows = rows_of(view)
    assert rows["restarts"] == "1  the newest after step 20"
    assert rows["accepted:"] == "other samples (2 times)"


def test_a_file_that_cannot_be_read_is_a_line(run_dir: Path) -> None:
    watcher = RunWatcher(run_dir)
    watcher.look()
    metrics_path(run_dir).unlink()
    metrics_path(run_dir).mkdir()
    view = watcher.look()
    assert view.problem == f"{metrics_path(run_dir)} cannot be read (Is a directory)"
    config_file(run_dir).write_text("run: [")
    assert "config.yaml is not YAML" in picture(watcher.look(), columns=200)
    incarnation_file(run_dir).unlink()
    assert watcher.look().state == "broken"


def test_damage_elsewhere_does_no_harm(run_dir: Path) -> None:
    (run_dir / "environment.json").write_text('{"world_size": "4", "layout": [1]}')
    (run_dir / "certificates.jsonl").write_text('{"step": 12}\n{"st')
    fields = {"failed_saves": "many", "step_seconds": float("nan"), "save_seconds": float("inf"), "memory_gb": None}
    write_steps(run_dir, 41, 41, **fields)
    write_log(run_dir, "\x1b[2J cannot be shown")
    with (logs_folder(run_dir) / "rank_0.log").open("ab") as file:
        file.write(b"\xff\0 cannot be read\n  10%\r  20%\n")
    view = RunWatcher(run_dir).look()
    assert (view.ranks, view.layout, view.began_after) == (None, None, 12)
    assert view.seconds_left == pytest.approx(6.0, abs=0.5)
    shown = picture(view)
    assert "\\x1b[2J cannot be shown" in shown
    assert not set(shown) & set("\x1b\0\r")
    assert view.saying == "  20%"


def test_warnings_are_known_by_their_words(tmp_path: Path) -> None:
    """The log holds the messages alone: each that a training run may warn with is recognized."""
    others = ("training/evaluation/", "training/model/decoding.py", "training/export/run.py", "training/tracking/")
    others += ("launch/study/", "launch/commands/track.py", "launch/copies.py")
    others += ("training/study/", "training/retrieval/", "training/harness/")
    calls = [
        (node.func.attr, node.args[0].value)
        for source in sources_of("training", "parallel", "launch")
        if not source.name.startswith(others) and source.name != "launch/commands/run.py"
        for node in source.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
        if getattr(node.func.value, "id", "") == "logger"
    ]
    said = {
        kind: {text for name, text in calls if name == kind and re.search("[a-z]{3}", text)}
        for kind in ("warning", "error", "info")
    }
    assert min(map(len, said.values())) >= 3
    write_log(tmp_path, *sorted(said["warning"] | said["error"] | said["info"]))
    log = FollowedLog(tmp_path)
    log.update()
    kept = set(log.warnings)
    assert not kept & said["info"]
    assert len(kept) == 20
    for line in said["warning"] | said["error"]:
        write_log(tmp_path, START, line)
        log.update()
        assert [*log.warnings] == [line], line


def test_the_command_prints_one_picture_or_json(trainshort: Call, folder: Path, run_dir: Path) -> None:
    answer = trainshort("watch", str(run_dir))
    assert (answer.code, answer.error) == (0, "")
    assert answer.out == trainshort("watch", str(run_dir), "--once", "--every", "5").out
    assert "\nstep 40/100  40%  " in answer.out
    assert "\x1b" not in answer.out
    values = json.loads(trainshort("watch", str(run_dir), "--json").out)
    assert (values["state"], values["step"], values["steps"], values["newest_checkpoint"]) == ("running", 40, 100, 40)
    assert (values["loss"], values["grad_norm"], values["memory_gb"], values["ranks"]) == (7.6, 0.5, 1.0, 4)
    assert (values["restarts"], values["warnings"], values["problem"]) == (0, [], None)
    old = trainshort("watch", str(OLD_RUN)).out
    for part in ("stopped", "step 4/", "5.9679", "memory", "586 MB"):
        assert part in old


def test_what_is_no_run_folder_is_refused(trainshort: Call, folder: Path) -> None:
    (folder / "empty").mkdir()
    assert refused(trainshort, "watch", "nope") == "run folder nope does not exist: give the run.dir of a run"
    assert refused(trainshort, "watch", "run.yaml") == "run folder run.yaml is a file: give the run.dir of a run"
    assert refused(trainshort, "watch", "empty") == "empty is not a run folder: give one that `trainshort runs` lists"
    make_run(folder / "my")
    for value in ("0", "-1", "nan", "1e9"):
        assert refused(trainshort, "watch", "my", "--every", value).startswith("--every must be 0.1 to 86,400 seconds")
    assert refused(trainshort, "watch", "my", "--every", "often").startswith("--every must be a number, got 'often'")


def test_a_folder_that_vanishes_ends_it(run_dir: Path) -> None:
    watcher = RunWatcher(run_dir)
    watcher.look()
    run_dir.rename(run_dir.with_name("moved"))
    with pytest.raises(InputError, match="does not exist"):
        watcher.look()
