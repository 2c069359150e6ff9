"""A study in its own process: killed in a run, it goes on; its commands get its signals; MLflow nests its runs."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import MachineError
from configs.study import load_study
from launch.study.processes import commands_until_asked
from tests.support.data import write_book
from tests.support.processes import PROGRAM, environment, trainshort, wait_until
from tests.support.small_run import TINY, small_run
from training.study.rows import StudyRow, deciding_values, values_sha256, write_row

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": "run.yaml",
    "dir": "study",
    "lengths": [8, 32],
    "runs": {"alibi": {}, "none": {"set": {"model.position": "none"}}},
}


def tags(database: Path, name: str) -> dict[str, str]:
    """Return a tag of each run that has it, by the run's name."""
    query = "select runs.name, tags.value from runs join tags on tags.run_uuid = runs.run_uuid where tags.key = ?"
    with closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute(query, (name,)))


def write_row_of_another_machine(folder: Path) -> None:
    """Write the row of the first run, whose folder is not here."""
    with contextlib.chdir(folder):
        loaded = load_study("study.yaml")
        planned = loaded.runs[0]
        values = deciding_values(planned.config)
        results = [
            {"text": "held-out", "text_sha256": "", "protocol": "nonoverlapping", "length": length, "perplexity": 50.0}
            for length in STUDY["lengths"]
        ]
        figures = {"train_length": 8, "steps": 3, "tokens": 96}
        hashes = values_sha256(values)
        row = StudyRow("tiny", planned.run, planned.seed, hashes, values, {}, {}, "a GPU", "", figures, results)
        write_row(loaded.rows, row)


def test_a_killed_study_goes_on_and_repeats_no_run(tmp_path: Path) -> None:
    write_book(tmp_path)
    few = {"data": {"split": 0.1}, "train": {"steps": 3}, "checkpoint": {"every": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run(TINY, few)))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    write_row_of_another_machine(tmp_path)
    first = (tmp_path / "study.rows.jsonl").read_text()
    run_dir = tmp_path / "study" / "none-seed1"
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(
            [*PROGRAM, "study", "study.yaml"], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
        said = (tmp_path / "log").read_text
        begun = (run_dir / "logs" / "rank_0.log").exists  # the run's launcher has begun
        wait_until(lambda: begun() or killed.poll() is not None, said)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, said()

    done = trainshort(tmp_path, "study", "study.yaml", "--json", environment=environment())
    assert done.returncode == 0, done.stderr  # no process of the killed study trains any more
    assert (tmp_path / "study.rows.jsonl").read_text().startswith(first)
    assert not (tmp_path / "study" / "alibi-seed1").exists(), "it is finished elsewhere"
    table = json.loads(done.stdout)
    assert [(run["run"], run["steps"], run["tokens"]) for run in table["runs"]] == [("alibi", 3, 96), ("none", 3, 96)]
    report = json.loads((run_dir / "evaluation" / "report.json").read_text())
    measured = [(result["length"], result["perplexity"]) for result in report["results"]]
    assert [(result["length"], result["perplexity"]) for result in table["runs"][1]["results"]] == measured
    assert (tmp_path / "study" / "study.png").read_bytes()[1:4] == b"PNG"
    database = tmp_path / "study" / "mlflow.db"
    assert tags(database, "trainshort.study") == {"none-seed1": "tiny", "tiny": "tiny"}
    parent = json.loads((tmp_path / "study" / "mlflow_run.json").read_text())["run_id"]
    assert tags(database, "mlflow.parentRunId")["none-seed1"] == parent


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replace Python, and with it every command of a study, by a line of bash; return a file that it may write."""

    def replace(line: str) -> Path:
        (tmp_path / "python").write_text(f"#!/bin/bash\ncd {tmp_path}\n{line}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        return tmp_path / "said"

    return replace


def test_a_command_gets_ctrl_c_once_and_from_the_study(program: Callable[[str], Path]) -> None:
    said = program("trap 'echo asked >>said; exit 7' INT; echo begun >>said; while :; do sleep 0.05; done")
    before = signal.getsignal(signal.SIGINT)

    def press() -> None:
        wait_until(said.exists, lambda: "the command has not begun")
        os.kill(os.getpid(), signal.SIGINT)

    with commands_until_asked() as commands:
        thread = threading.Thread(target=press)
        thread.start()
        assert commands.run("train") == 7
        thread.join()
        assert commands.asked == 1
    assert said.read_text() == "begun\nasked\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_command_that_is_killed_is_the_machines_fault(
    program: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    program("kill -9 $$")
    with commands_until_asked() as commands:
        assert commands.run("evaluate") == MachineError.exit_code
    assert caplog.messages == ["trainshort evaluate was killed by SIGKILL: check whether memory ran out"]
