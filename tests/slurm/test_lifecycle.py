"""Time limits, stops, failures, lost nodes: a run that resumes has the losses of an uninterrupted one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import CLUSTER, STEPS, Submitted, slurm, submit
from tests.support.processes import trainshort, wait_until

pytestmark = pytest.mark.slurm

BACKGROUND = "checkpoint.background=true"
HOOK = 'track.hook=echo "$TRAINSHORT_EVENT $TRAINSHORT_STEP" >>"$TRAINSHORT_RUN_DIR/events"'


def on_nodes(*command: str) -> None:
    subprocess.run([CLUSTER, *command], check=True)


def wait_for_node(node: str, run: Submitted) -> None:
    wait_until(lambda: f"{node} idle" in slurm("sinfo", "-hN", "-p", "main", "-o", "%N %T"), run.diagnosis)


def test_a_time_limit_requeues_the_job_and_changes_no_loss(home: Path, unbroken: Submitted) -> None:
    options = ("slurm.time='0:03:00'", "slurm.signal_seconds=60", BACKGROUND, HOOK)
    run = submit(home, "limited", *options, run_dir="runs/10% limited")  # SLURM must read the % as part of the name
    run.suspend(3)
    # A change of the run file has no effect before the next submission.
    (home / "limited.yaml").write_text("not: [a run file")
    assert 60 < run.status()["jobs"][0]["seconds_left"] <= 180
    wait_until(lambda: (run.status()["jobs"][0]["seconds_left"] or 0) < 59, run.diagnosis)
    run.wake()
    run.wait_for_line("queueing again")
    saved = run.status()["checkpoint"]
    assert saved > "step_0000000"
    assert run.states()["evaluate"] == "PENDING"
    run.wait_for(state="RUNNING")
    assert run.field("Restarts") == "1"
    run.wait_for()
    run.jobs("stop")
    assert f"start 1 from {saved} on node" in run.log()
    assert run.exact() == unbroken.exact()
    step = int(saved.removeprefix("step_"))
    told = (run.folder / "events").read_text().splitlines()
    ends = [event for event in told if not event.startswith("saved ")]
    assert ends == ["started 0", f"requeued {step}", f"started {step}", f"finished {STEPS}"]
    assert {f"saved {step}", f"saved {STEPS}"} <= {*told}
    logs = run.folder / "logs"
    assert {file.name for file in logs.glob("rank_*")} == {f"rank_{rank}.log" for rank in range(4)}
    text = (logs / "rank_0.log").read_text()
    assert "stopped after step" in text
    assert f"step {STEPS}/{STEPS}" in text


def test_stop_and_resume_under_torchrun_change_no_loss(home: Path, unbroken: Submitted) -> None:
    run = submit(home, "torchrun", "slurm.starter=torchrun")
    assert "srun --kill-on-bad-exit=1 \\\n  bash -c" in (run.folder / "slurm" / "train.sbatch").read_text()
    run.suspend(2)
    refused = trainshort(home, "slurm", "torchrun.yaml", "--submit")
    assert refused.returncode == 2
    assert f"runs/torchrun has job {run.job()} (train, RUNNING) already: wait for it, or end it" in refused.stderr
    first = run.job()
    assert run.jobs("stop").splitlines() == [
        f"export: job {run.job('export')} is cancelled",
        f"evaluate: job {run.job('evaluate')} is cancelled",
        f"train: job {first} is asked to save and end",
    ]
    run.wake()
    wait_until(
        lambda: run.states() == {"train": "STOPPED", "evaluate": "CANCELLED", "export": "CANCELLED"}, run.diagnosis
    )
    assert not (run.folder / "slurm" / "stop").exists(), "the job removed it when it stopped"
    steps = len(run.metrics())
    assert 2 <= steps < STEPS
    assert run.status()["checkpoint"] == f"step_{steps:07d}"
    assert run.status()["advice"] == "stopped: trainshort jobs resume runs/torchrun continues it"
    assert run.jobs("resume").startswith("submitted train: job ")
    assert run.job() != first
    run.wait_for()
    run.wait_for("evaluate")
    run.jobs("stop")
    theirs, ours = (json.loads((each.folder / "evaluation" / "report.json").read_text()) for each in (unbroken, run))
    assert [result["perplexity"] for result in ours["results"]] == [each["perplexity"] for each in theirs["results"]]
    assert f"start 0 from step_{steps:07d} on node" in run.log()
    assert run.exact() == unbroken.exact()
    text = (run.folder / "logs" / "rank_0.log").read_text()
    assert f"stopped after step {steps}, saved" in text
    assert f"step {STEPS}/{STEPS}" in text


def test_a_failed_training_leaves_nothing_waiting(home: Path) -> None:
    sections = ("parallel", "evaluate")
    one_rank = [f"{section}.{axis}=1" for section in sections for axis in ("tensor", "pipeline")]
    run = submit(home, "failed", *one_rank, "slurm.ranks_per_node=1", "train.learning_rate=1e30", HOOK, nodes=1)
    run.wait_for(state="FAILED")
    assert [file.name for file in (run.folder / "logs").glob("rank_*")] == ["rank_0.log"]
    assert (run.folder / "logs" / "rank_0.log").read_text().count("data 1, ZeRO-1") == 1
    wait_until(
        lambda: run.states() == {"train": "FAILED", "evaluate": "CANCELLED", "export": "CANCELLED"}, run.diagnosis
    )
    assert run.field("Restarts") == "0"
    assert (run.folder / "events").read_text().splitlines()[-1] == "failed 0"
    *_, summary, error = run.log().splitlines()
    assert summary.endswith(": read runs/failed/logs/rank_*.log")
    assert error.startswith("error: the loss is nan")
    log = f"runs/failed/logs/slurm-train-{run.job()}.log"
    assert run.status()["advice"] == f"train ended FAILED: read {log}, then trainshort jobs resume runs/failed"
    assert slurm("squeue", "--noheader") == ""


def test_a_run_without_progress_is_not_requeued_forever(home: Path) -> None:
    run = submit(home, "stuck")
    for start in range(3):
        run.wait_for_line(f"start {start} from step 0 on node")
        slurm("scontrol", "requeue", run.job())  # as SLURM does when a node fails
    run.wait_for(state="FAILED")
    assert "no progress: three starts went no further than step 0; read runs/stuck/logs/rank_*.log" in run.log()
    wait_until(lambda: slurm("squeue", "--noheader") == "", run.diagnosis)
    run.jobs("resume")
    run.wait_for_line("start 0 from step 0 on node")
    slurm("scancel", "--batch", "--signal=USR1", run.job())  # as SLURM does before the time limit
    run.wait_for(state="FAILED")
    assert "no progress: nothing was saved since step 0, so the job is not queued again" in run.log()
    wait_until(lambda: slurm("squeue", "--noheader") == "", run.diagnosis)


def test_a_crashed_node_is_replaced(home: Path, unbroken: Submitted) -> None:
    run = submit(home, "crashed", BACKGROUND)
    run.suspend(6)
    assert run.field("NodeList") == "node[1-2]"
    on_nodes("crash", "node2")
    try:
        wait_until(lambda: run.field("Restarts") == "1", run.diagnosis)
        needy = submit(home, "needy", "train.global_batch=24", "train.micro_batch=1", "parallel.pipeline=3", nodes=3)
        wait_until(lambda: needy.status()["advice"], needy.diagnosis)
        advice = needy.status()["advice"]
        assert advice.startswith("train waits for 3 nodes with what its script asks for (")
        assert "DOWN" in advice or "ReqNodeNotAvail" in advice
        stopped = [f"{name}: job {needy.job(name)} is cancelled" for name in ("export", "evaluate", "train")]
        assert needy.jobs("stop").splitlines() == stopped
        assert set(needy.states().values()) == {"CANCELLED"}
        run.wait_for()
        run.jobs("stop")
    finally:
        on_nodes("boot", "node2")
        wait_for_node("node2", run)
    assert run.field("NodeList") == "node[1,3]"
    assert "start 1 from step_0000004 on node[1,3]" in run.log()
    assert run.exact() == unbroken.exact()
    assert os.path.exists(run.folder / "logs" / "metrics_discarded.jsonl")


def test_a_node_that_shuts_down_is_no_failure_of_the_run(home: Path) -> None:
    run = submit(home, "lost")
    wait_until(run.metrics, run.diagnosis)
    on_nodes("on", "node2", "pkill", "-KILL", "slurmd")
    try:
        run.kill("node2")  # SLURM notices the lost node only later
        run.wait_for_line("a node is lost: queueing again from step ")
        assert run.field("Restarts") == "1"
        run.jobs("stop")
    finally:
        on_nodes("on", "node2", "slurmd")
        wait_for_node("node2", run)


def test_a_stop_survives_the_crash_of_its_node(home: Path) -> None:
    run = submit(home, "forgotten")
    run.suspend(2)
    assert run.field("BatchHost") == "node1"
    run.jobs("stop")
    on_nodes("crash", "node1")
    try:
        run.wait_for(state="FAILED")
    finally:
        on_nodes("boot", "node1")
        wait_for_node("node1", run)
    assert run.field("Restarts") == "1"
    assert run.states()["train"] == "STOPPED"
    assert len([line for line in run.log().splitlines() if " start " in line]) == 1


def test_a_preempted_job_saves_and_requeues(home: Path, unbroken: Submitted) -> None:
    run = submit(home, "preempted", "slurm.partition=spot")
    run.suspend(2)
    # The ranks get SIGTERM at once and have a minute of grace. Exiting with 0 in that time must not end the job.
    preempt = [
        "sbatch",
        "--parsable",
        "--partition=main",
        "--nodes=3",
        "--exclusive",
        "--wrap=true",
        "--output=/dev/null",
    ]
    slurm(*preempt)
    wait_until(lambda: run.field("PreemptTime") != "None", run.diagnosis)
    run.wake()
    run.wait_for_line("queueing again")
    saved = run.status()["checkpoint"]
    run.wait_for()
    run.jobs("stop")
    assert f"start 1 from {saved} on node" in run.log()
    assert run.exact() == unbroken.exact()
