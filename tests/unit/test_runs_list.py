"""`trainshort runs`: which runs are found, and what is said about each."""

import errno
import json
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from configs.paths import chain_file
from tests.support.command_line import Call, refused
from tests.support.run_folders import make_run, start_run
from training.checkpoint.manifest import CheckpointFolder, list_checkpoints
from training.tracking.record import RunRecord, write_record

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
ENDED = {"process_started": 1}
ELSEWHERE = {"machine": "another", "host": "node7"}


def listed(trainshort: Call, *arguments: str) -> dict[str, dict[str, Any]]:
    """Return the runs of `trainshort runs --json` by the path below the test's runs/."""
    answer = trainshort("runs", *arguments, "--json")
    assert (answer.code, answer.error) == (0, "")
    return {run["path"].removeprefix("runs/"): run for run in json.loads(answer.out)}


def test_the_folder_of_a_study_is_no_run(trainshort: Call, folder: Path) -> None:
    study = folder / "runs" / "study"
    (study / "data").mkdir(parents=True)
    (study / "data" / "manifest.json").write_text("{}")
    write_record(study, RunRecord("1", None))
    assert [*listed(trainshort)] == ["study"], "a run, as far as this shows"
    (study / "study.json").write_text("{}")
    assert listed(trainshort) == {}
    for command in (("watch",), ("runs", "rm", "--yes")):
        assert refused(trainshort, *command, "runs/study").startswith("runs/study is not a run folder: ")
    start_run(make_run(study / "alibi-seed1"))
    assert [*listed(trainshort)] == ["study/alibi-seed1"]


def test_the_state_of_a_run_is_read_from_its_files(trainshort: Call, folder: Path) -> None:
    runs = folder / "runs"
    start_run(make_run(runs / "running", last=6, saved=(4,)))
    start_run(make_run(runs / "finished", last=10, saved=(8, 10)), **ENDED)
    start_run(make_run(runs / "stopped", last=6, saved=(4, 6)), **ENDED)
    start_run(make_run(runs / "failed", last=6, saved=(4,)), **ENDED)
    start_run(make_run(runs / "never began"), **ENDED)
    start_run(make_run(runs / "elsewhere", last=6, saved=(6,)), **ELSEWHERE)
    start_run(make_run(runs / "ended elsewhere", last=6, saved=(4,)), **ELSEWHERE)
    write_record(runs / "ended elsewhere", RunRecord("1", None))  # that start has told MLflow its end
    start_run(make_run(runs / "rebooted", last=6, saved=(6,)), machine=f"{'0' * 36} pid:[1]")
    make_run(runs / "new")
    make_run(runs / "submitted")
    chain_file(runs / "submitted").parent.mkdir()
    chain_file(runs / "submitted").write_text("{}")
    (runs / "prepared" / "data").mkdir(parents=True)
    (runs / "prepared" / "data" / "manifest.json").write_text("{}")

    shown = listed(trainshort)
    assert {name: run["state"] for name, run in shown.items()} == {
        "running": "running",
        "finished": "finished",
        "stopped": "stopped",
        "failed": "failed",
        "never began": "failed",
        "elsewhere": "unknown",
        "ended elsewhere": "failed",
        "rebooted": "stopped",
        "new": "new",
        "submitted": "submitted",
        "prepared": "prepared",
    }
    table = trainshort("runs").out
    assert "unknown: started on node7" in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_run_shows_its_figures(trainshort: Call, folder: Path) -> None:
    start_run(make_run(folder / "runs" / "a", last=6, saved=(4, 5)))
    start_run(make_run(folder / "runs" / "b", last=4), **ENDED)
    make_run(folder / "runs" / "c")
    shown = listed(trainshort)
    assert shown["a"].pop("bytes") == sum(
        path.stat().st_size for path in (folder / "runs" / "a").rglob("*") if path.is_file()
    )
    assert datetime.now(UTC) - datetime.fromisoformat(shown["a"].pop("written_at")) < timedelta(minutes=1)
    assert shown["a"] == {
        "path": "runs/a",
        "name": "demo",
        "state": "running",
        "host": socket.gethostname(),
        "step": 6,
        "steps": 10,
        "loss": 8.4,
        "best_validation": 7.25,
        "checkpoints": 2,
        "newest_checkpoint": 5,
        "problem": None,
    }
    assert shown["b"]["best_validation"] == 7.6
    assert shown["c"]["loss"] is shown["c"]["newest_checkpoint"] is shown["c"]["best_validation"] is None


def test_runs_are_found_three_levels_deep_and_once(trainshort: Call, folder: Path) -> None:
    runs = folder / "runs"
    for path in ("a", "team/b", "team/x/c", "team/x/y/too deep", "data/hidden", "team/checkpoints/hidden"):
        make_run(runs / path)
    inner = make_run(runs / "a" / "inner")
    (runs / "data" / "manifest.json").write_text("{}")  # data that the runs share
    (runs / "loop").symlink_to(runs)
    (runs / "team" / "again").symlink_to(inner)
    make_run(folder / "outside")
    (runs / "link").symlink_to(folder / "outside")
    (runs / "foreign").mkdir()
    (runs / "foreign" / "config.yaml").write_text("a: 1\n")  # another program's
    assert [*listed(trainshort)] == ["a", "a/inner", "link", "team/b", "team/x/c"]
    assert [*listed(trainshort, "runs/team/x/y")] == ["team/x/y/too deep"]
    assert [*listed(trainshort, "runs/a/inner")] == ["a/inner"]
    (folder / "rm").mkdir()
    assert trainshort("runs", "./rm").out == "rm holds no run\n"
    assert "folder nope does not exist: give the folder of your runs" in refused(trainshort, "runs", "nope")
    assert "folder run.yaml is a file" in refused(trainshort, "runs", "run.yaml")


def test_a_broken_run_is_a_row_that_says_so(trainshort: Call, folder: Path) -> None:
    names = ("yaml", "metrics", "incarnation")
    for name in names:
        start_run(make_run(folder / "runs" / name, last=6, saved=(6,)), **ENDED)
    (folder / "runs" / "yaml" / "config.yaml").write_text("run: [")
    (folder / "runs" / "metrics" / "metrics.jsonl").unlink()
    (folder / "runs" / "metrics" / "metrics.jsonl").mkdir()
    (folder / "runs" / "incarnation" / "incarnation").write_text("nonsense")
    (folder / "runs" / "alone").mkdir()
    (folder / "runs" / "alone" / "config.yaml").write_text("run: [")
    answer = trainshort("runs")
    assert answer.code == 0
    assert answer.out.count("\n broken ") == 4
    for problem in (
        "yaml/config.yaml is not YAML",
        "metrics/metrics.jsonl cannot be read (Is",
        "incarnation can",
    ):
        assert problem in answer.out


def test_torn_and_damaged_metrics_are_passed_over(trainshort: Call, folder: Path) -> None:
    damage = {
        "torn": b'{"step": 7, "lo',
        "zeros": b"\x00" * 512 + b"\n",
        "bytes": b'{"step": 7, \xff}\n',
        "other": b'[]\n"x"\n{"step": "7", "loss": 1.0}\n{"step": 7, "loss": "low"}\n',
    }
    for name, end in damage.items():
        run_dir = start_run(make_run(folder / "runs" / name, last=6, saved=(6,)), **ENDED)
        with (run_dir / "metrics.jsonl").open("ab") as file:
            file.write(end)
    diverged = start_run(make_run(folder / "runs" / "diverged", last=6, saved=(6,)), **ENDED)
    with (diverged / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": NaN, "validation_loss": NaN}\n')
    shown = listed(trainshort)
    assert shown.pop("diverged")["loss"] is None
    assert " nan " in trainshort("runs").out
    for name, run in shown.items():
        assert (run["state"], run["step"], run["loss"], run["problem"]) == ("stopped", 6, 8.4, None), name
        assert run["best_validation"] == 7.25


def test_a_folder_that_cannot_be_read_is_a_row(trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(folder / "runs" / "good", last=6, saved=(6,))
    start_run(make_run(folder / "runs" / "locked", last=6), **ENDED)

    def refuse(path: Path) -> list[CheckpointFolder]:
        if path.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_checkpoints(path)

    monkeypatch.setattr("launch.runs.list_checkpoints", refuse)
    assert {name: run["state"] for name, run in listed(trainshort).items()} == {"good": "stopped", "locked": "broken"}
    assert "broken: runs/locked cannot be read (Permission denied)" in trainshort("runs").out


def test_the_old_release_is_listed(trainshort: Call, folder: Path) -> None:
    [run] = listed(trainshort, str(OLD_RUN)).values()
    assert (run["state"], run["step"], run["steps"], run["checkpoints"]) == ("stopped", 4, 4, 1)


def test_hundreds_of_runs_and_large_metrics_are_fast(trainshort: Call, folder: Path) -> None:
    for number in range(100):
        make_run(folder / "runs" / f"run-{number:03}", last=8, saved=(4, 8))
    with (folder / "runs" / "run-000" / "metrics.jsonl").open("r+b") as file:
        last = file.read()
        file.truncate(1 << 30)  # a hole: nothing is written
        file.seek(0, 2)
        file.write(b"\n" + last)
    began = time.process_time()
    shown = listed(trainshort)
    assert time.process_time() - began < 2
    assert len(shown) == 100
    assert shown["run-000"]["step"] == 8


def test_a_narrow_terminal_shows_the_names(trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("baseline", "rotary", "a-long-name-of-a-run"):
        start_run(make_run(folder / "runs" / name, last=6, saved=(6,)), **ENDED)
    headings = {}
    for width in (30, 40, 50, 60, 70, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        out = trainshort("runs").out
        assert max(map(len, out.splitlines())) <= width
        assert not [line for line in out.splitlines() if line.endswith(" ")]
        assert "baseline" in out
        assert "rotary" in out
        headings[width] = out.split("\n")[1].split()
        assert headings[width][:2] == ["state", "step"]
        assert headings[width][-1] == "run"
    assert headings[30] == headings[40] == ["state", "step", "run"]
    assert headings[80] == ["state", "step", "loss", "best", "saves", "newest", "size", "age", "run"]
    assert headings[70] == ["state", "step", "loss", "saves", "newest", "size", "age", "run"]


@pytest.mark.parametrize("width", ["80", "60"])
def test_a_long_name_folds_on_a_narrow_terminal(
    trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    start_run(make_run(folder / "runs" / ("long-name-" * 6), steps=123456, last=6, saved=(6,)), **ENDED)
    monkeypatch.setenv("COLUMNS", width)
    assert max(map(len, trainshort("runs").out.splitlines())) <= int(width)
