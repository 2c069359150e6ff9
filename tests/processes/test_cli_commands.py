"""The command line: output and exit codes, in a process of its own where one is enough to prove them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_line import Call, refused


def run_apart(*arguments: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "trainshort", *arguments],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def run_file(folder: Path, values: dict[str, Any]) -> str:
    (folder / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return "small.yaml"


def test_help_names_the_commands_and_only_those(tmp_path: Path) -> None:
    shown = run_apart("--help", folder=tmp_path).stdout
    commands = [line.split()[1] for line in shown.split("Commands")[1].splitlines() if line[2:3].isalpha()]
    assert commands == [
        *("init", "check", "prepare", "train", "watch", "profile", "evaluate", "compare", "report", "generate"),
        *("retrieval", "study", "harness", "export", "import", "slurm", "doctor", "reproduce", "runs", "checkpoint"),
        *("jobs", "track"),
    ]


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}, {}])
def test_escape_codes_reach_a_terminal_that_wants_them(plain: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    subprocess.run(
        [sys.executable, "-P", "-m", "trainshort", "check", "--help"],
        cwd=tmp_path,
        env={**kept, "TERM": "xterm", **plain},
        stdout=theirs,
        stderr=theirs,
        check=True,
        timeout=240,
    )
    os.close(theirs)
    assert (b"\x1b" in os.read(ours, 1 << 16)) == (not plain)
    os.close(ours)


def test_check_summarizes_the_run(tmp_path: Path) -> None:
    done = run_apart("check", "alibi-1b3", folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    for part in ("alibi-1b3 is valid", "1,361,987,584 parameters", "1,048,576 tokens", "tensor 2 x pipeline 2, ZeRO-1"):
        assert part in done.stdout


def test_check_prints_one_json_document(tmp_path: Path) -> None:
    done = run_apart("check", "demo", "--json", "--set", "run.dir=here", folder=tmp_path)
    summary = json.loads(done.stdout)
    assert summary["parameters"] > 1_000_000
    assert (summary["dir"], summary["data"]) == ("here", "here/data")


def test_a_wrong_run_is_one_message_and_exit_2(tmp_path: Path, run_values: dict[str, Any]) -> None:
    run_values["model"]["heads"] = 5
    run = run_file(tmp_path, run_values)
    done = run_apart("check", run, "--set", "train.micro_batch=3", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: small.yaml has 3 problems:",
        "  model.heads must divide model.hidden (64), got 5: use 1, 2, 4, 8, 16, 32 or 64",
        "  parallel.tensor must divide model.heads (5), got 2: use 1 or 5",
        "  train.micro_batch must divide train.global_batch (8), got 3: use 1, 2, 4 or 8",
    ]


def one_line(done: "subprocess.CompletedProcess[str]", code: int = 2) -> str:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_refuses_before_any_process_starts(here: Path, run_values: dict[str, Any], trainshort: Call) -> None:
    run_values["run"]["dir"] = "run"
    run = run_file(here, run_values)
    assert refused(trainshort, "train", run, "--ranks", "3").startswith(
        "ranks must be a multiple of parallel.tensor x parallel.pipeline (2 x 2 = 4), got 3: start 4 or 8 ranks"
    )
    assert refused(trainshort, "train", run) == (
        f"data is not prepared in run/data (relative to {here}): run `trainshort prepare small.yaml`"
    )
    assert not (here / "run").exists()
    (here / "run").write_text("")
    for command in ("train", "prepare", "slurm"):
        assert refused(trainshort, command, run).startswith("run.dir run: run is a file, not a folder")


def test_ranks_inside_a_job_are_refused(tmp_path: Path) -> None:
    done = run_apart(
        "train", "demo", "--ranks", "2", folder=tmp_path,
        TRAINSHORT_RANK="1", TRAINSHORT_RANKS="4", TRAINSHORT_RENDEZVOUS="/tmp/none",
    )  # fmt: skip
    assert one_line(done) == (
        "--ranks 2 starts local ranks, but this is rank 1 of 4 already: leave --ranks out under local"
    )


def test_a_missing_checkpoint_is_named(here: Path, trainshort: Call) -> None:
    missing = "checkpoint run does not exist: give a folder of RUN_DIR/checkpoints, or RUN_DIR"
    (here / "new" / "checkpoints").mkdir(parents=True)
    assert refused(trainshort, "checkpoint", "list", "run") == (
        "run folder run does not exist: give the run.dir of a run"
    )
    assert trainshort("checkpoint", "list", "new").out == "new has no checkpoint yet\n"
    assert json.loads(trainshort("checkpoint", "list", "new", "--json").out) == []
    assert refused(trainshort, "evaluate", "run") == missing
    assert refused(trainshort, "evaluate", "new") == "new has no checkpoint yet: train it first"
    assert refused(trainshort, "export", "run", "--format", "hf", "--out", "x") == missing
    (here / "begun" / "logs").mkdir(parents=True)  # a start that ended before its first checkpoint
    assert refused(trainshort, "checkpoint", "verify", "begun") == "begun has no checkpoint yet: train it first"


def test_slurm_prints_scripts_with_the_overrides(here: Path, trainshort: Call) -> None:
    assert refused(trainshort, "slurm", "demo", "--nodes", "2", "--set", "run.name=two words").startswith(
        "demo: run.name: string should match pattern"
    )
    answer = trainshort("slurm", "demo", "--nodes", "2", "--set", "track.experiment=two words")
    assert answer.code == 0
    assert answer.out.count("#!/bin/bash") == 3
    assert f"cd {here}" in answer.out
    assert "train demo --set 'track.experiment=two words' &" in answer.out
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("here")
def test_slurm_refuses_ranks_that_do_not_fit(trainshort: Call) -> None:
    assert refused(trainshort, "slurm", "bloom-176b", "--nodes", "4").startswith(
        "ranks must be a multiple of parallel.tensor x parallel.pipeline (4 x 12 = 48)"
    )
    assert "#SBATCH --nodes=6\n" in trainshort("slurm", "bloom-176b").out


def test_submit_without_slurm_is_a_machine_error(tmp_path: Path) -> None:
    done = run_apart("slurm", "demo", "--submit", folder=tmp_path, PATH=str(tmp_path))
    assert one_line(done, code=3).startswith("sbatch is not on this machine")


@pytest.mark.parametrize("regular", [True, False])
def test_a_foreign_package_is_named_and_not_imported(tmp_path: Path, regular: bool) -> None:
    foreign = tmp_path / "their code" / "training"
    foreign.mkdir(parents=True)
    if regular:
        (foreign / "__init__.py").write_text("raise SystemExit('imported')")
    message = one_line(run_apart("check", "demo", folder=tmp_path, PYTHONPATH=str(foreign.parent)), code=3)
    assert message.startswith(f"Python would import the package training from {foreign}, not from ")
    assert message.endswith(f": take {foreign.parent} out of PYTHONPATH, or rename training there")


def test_a_package_in_the_working_directory_does_no_harm(tmp_path: Path) -> None:
    for name in ("training", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    assert run_apart("check", "demo", folder=tmp_path).returncode == 0


def test_a_bug_shows_its_traceback_and_is_exit_1(tmp_path: Path) -> None:
    code = "import configs.load, trainshort\ndef broken(*a, **k): raise RuntimeError('ours')\n"
    code += "configs.load.load_run = broken\ntrainshort.main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "check", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.rstrip().endswith("RuntimeError: ours")
