"""SLURM's commands stubbed, for the scripts in bash and for what asks them; tests/slurm has the real ones."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import check_run
from configs.paths import chain_file
from launch.slurm.script import CHAIN, render
from launch.slurm.submit import freeze, sole_submission

STUBS = """
scontrol() { # as much as of a large job: who stops reading early ends it
  [[ $1 == show && $2 == hostnames ]] && printf '%s\\n' "$FIRST" node{2..20000}
  [[ $1 == show && $2 == job ]] && printf '%s\\n' "PreemptTime=$PREEMPTED" {1..20000}
  [[ $1 == requeue ]] && { echo >>requeues; eval "$REQUEUEING"; (($(wc -l <requeues) > REFUSALS)); return; }
  return 0
}
sinfo() { echo "$NODES"; }
timeout() { echo "$@" >>probes; return $SILENT; } # the sign of life of each node
scancel() { echo "$@" >>told; return 1; }
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
        timeout=60,
    )


def words_of(script: str, folder: Path) -> list[str]:
    """Return where and how srun is called."""
    run_script(script, folder)
    return (folder / "calls").read_text().split("\0")[:-1]


def render_small(run_values: dict[str, Any], folder: Path, **slurm: Any) -> str:
    run_values["run"]["dir"] = "run"
    run_values["slurm"] = slurm
    return render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=folder)["train"]


def stub_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return what makes a command of SLURM that does what a line of bash says; no other is on the path."""
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
    """Return a run folder whose chain 101, 102, 103 was submitted."""
    run_dir = Path(run_values["run"]["dir"])
    with sole_submission(run_dir):
        freeze(check_run(run_values, name="small"))
    numbers = {"train": "101", "evaluate": "102", "export": "103"}
    chain_file(run_dir).write_text(json.dumps({"run": "small", "jobs": numbers, "nodes": 2, "submitted_at": "now"}))
    return run_dir


def show(number: int, state: str, **fields: str) -> str:
    words = " ".join(f"{key}={value}" for key, value in fields.items())
    name = f"small-{CHAIN[number - 101]}"
    return f"[[ $4 == {number} ]] && echo 'JobId={number} JobName={name} JobState={state} {words}'"
