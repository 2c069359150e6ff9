"""Stubs of SLURM's commands, for the scripts in bash and for code that calls them; tests/slurm has the real ones."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import check_run
from configs.paths import chain_file
from launch.slurm.script import CHAIN_JOBS, render_scripts
from launch.slurm.submit import freeze_run, script_file, sole_submission

STUBS = """
scontrol() { # prints as much as for a large job, so that a reader that stops early makes it fail
  [[ $1 == show && $2 == hostnames ]] && printf '%s\\n' "$FIRST" node{2..20000}
  [[ $1 == show && $2 == job ]] && printf '%s\\n' "PreemptTime=$PREEMPTED" {1..20000}
  [[ $1 == requeue ]] && { echo >>requeues; eval "$REQUEUEING"; (($(wc -l <requeues) > REFUSALS)); return; }
  return 0
}
sinfo() { echo "$NODES"; }
timeout() { echo "$@" >>probes; return $SILENT; } # asks each node for a sign of life
scancel() { echo "$@" >>signals; return 1; }
sleep() { command sleep 0.1; }
module() { printf 'module\\0%s\\0' "$@" >>calls; }
srun() {
  printf '%s\\0' "$PWD" "$ODD" "$MASTER_ADDR:$MASTER_PORT" "$OMP_NUM_THREADS" "$@" >>calls
  eval "$DURING"
}
"""
JOB = {
    "PATH": "/usr/bin:/bin",
    "SLURM_JOB_ID": "20007",
    "SLURM_JOB_NODELIST": "n",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_NODEID": "3",
    "DURING": "",
    "FIRST": "node1",
    "SLURM_JOB_NUM_NODES": "1",
    "REFUSALS": "0",
    "REQUEUEING": "",
    "PREEMPTED": "None",
    "NODES": "mixed",
    "SILENT": "0",
}


def run_script(script: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a script with SLURM stubbed; srun does what DURING says and writes its arguments to `calls`."""
    return subprocess.run(
        ["bash", "-c", STUBS + script],
        env={**JOB, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def words_of(script: str, folder: Path) -> list[str]:
    """Run a script and return the words that srun was called with, after its working directory and environment."""
    run_script(script, folder)
    return (folder / "calls").read_text().split("\0")[:-1]


def render_small(run_values: dict[str, Any], folder: Path, **slurm: Any) -> str:
    """Return the training script of a run in the folder `run`, with this slurm section."""
    run_values["run"]["dir"] = "run"
    run_values["slurm"] = slurm
    return render_scripts(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=folder)["train"]


def stub_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that creates a command of SLURM from a line of bash; no real one stays on the path."""
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, body: str) -> None:
        program = folder / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)

    return make


RUNNING = (
    "JobId=7 JobName=a-train UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=0:0 RunTime=00:10:30 TimeLimit=1-00:00:00 NodeList=gpu[1-4] BatchHost=gpu1 NumNodes=4 "
    "TRES=cpu=4,mem=4000M"
)


def submitted(run_values: dict[str, Any], folder: Path) -> Path:
    """Return a run folder with submitted jobs 101, 102 and 103."""
    run_dir = Path(run_values["run"]["dir"])
    with sole_submission(run_dir):
        freeze_run(check_run(run_values, name="small"))
        for name in CHAIN_JOBS:
            script_file(run_dir, name=name).touch()
    jobs = {"train": "101", "evaluate": "102", "export": "103"}
    chain_file(run_dir).write_text(json.dumps({"run": "small", "jobs": jobs, "nodes": 2, "submitted_at": "now"}))
    return run_dir


def show(job: int, state: str, **fields: str) -> str:
    """Return a line of bash that answers `scontrol --oneliner show job` for one of the jobs 101, 102, 103."""
    words = " ".join(f"{key}={value}" for key, value in fields.items())
    name = f"small-{CHAIN_JOBS[job - 101]}"
    return f"[[ $4 == {job} ]] && echo 'JobId={job} JobName={name} JobState={state} {words}'"
