"""How a training job ends: its script runs in bash, with stubs of SLURM's commands."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from configs.load import check_run
from launch.slurm.script import render_scripts
from tests.support.slurm import render_small, run_script

SAVE_4 = "mkdir -p run/checkpoints/step_0000004;"
SAVE_ALL = "mkdir -p run/checkpoints/step_0000010;"
LIMIT, STOP = "kill -USR1 $$; command sleep 0.3;", "kill -USR2 $$; command sleep 0.3;"
PREEMPTED = "2026-11-24T12:00:00"
QUEUED = "queueing again from step_0000004"
HOOK = 'echo "$TRAINSHORT_EVENT|$TRAINSHORT_STEP|$TRAINSHORT_CHECKPOINT|$TRAINSHORT_MESSAGE" >>events; sleep 0.01'


@pytest.mark.parametrize(
    ("during", "preempted", "code", "line"),
    [
        (SAVE_ALL, "None", 0, "trained to the last step: run/checkpoints/step_0000010"),
        (SAVE_ALL + "exit 1", "None", 0, "trained to the last step: run/checkpoints/step_0000010"),
        (LIMIT + SAVE_4, "None", 0, f"time limit: {QUEUED}"),
        (LIMIT + SAVE_4 + "exit 143", "None", 143, f"time limit: {QUEUED}"),
        (LIMIT, "None", 1, "no progress: nothing was saved since step 0, so the job is not queued again"),
        (STOP + SAVE_4, "None", 130, "stopped, the newest checkpoint is step_0000004: trainshort jobs resume run"),
        (STOP + "exit 143", "None", 130, "stopped, the newest checkpoint is "),
        (STOP + LIMIT + SAVE_4, "None", 130, "stopped, the newest checkpoint is step_0000004"),
        (LIMIT + STOP + SAVE_4, "None", 130, "stopped, the newest checkpoint is step_0000004"),
        (STOP + SAVE_4, PREEMPTED, 130, "stopped, the newest checkpoint is step_0000004"),
        (STOP + "exit 3", "None", 3, "asked to stop, but the save failed with exit code 3: read run/logs/rank_*.log"),
        (SAVE_4, "None", 130, "stopped, the newest checkpoint is step_0000004: trainshort jobs resume run"),
        (SAVE_4, PREEMPTED, 0, f"preempted: {QUEUED}"),
        ("exit 143", PREEMPTED, 143, "preempted: queueing again from step 0"),
        (LIMIT, PREEMPTED, 0, "preempted: queueing again from step 0"),
        (SAVE_4 + "exit 1", "None", 1, "failed with exit code 1: read run/logs/rank_*.log"),
        ("exit 2", "None", 2, "failed with exit code 2: read run/logs/rank_*.log"),
    ],
)
def test_a_training_job_ends_as_its_checkpoints_require(
    run_values: dict[str, Any], tmp_path: Path, during: str, preempted: str, code: int, line: str
) -> None:
    run_values["track"] = {"hook": HOOK}
    train = render_small(run_values, tmp_path)
    done = run_script(train, tmp_path, DURING=during, PREEMPTED=preempted)
    assert done.returncode == code, done.stdout + done.stderr
    assert line in done.stdout.splitlines()[-1]
    assert "start 0 from step 0 on n, job 20007" in done.stdout
    (event,) = (tmp_path / "events").read_text().splitlines()
    name, step, checkpoint, message = event.split("|")
    end = "finished" if "trained to" in line else {130: "stopped"}.get(code, "failed")
    assert name == ("requeued" if "queueing" in line else end)
    newest = f"step_{int(step):07d}"
    assert checkpoint == (str(tmp_path / "run" / "checkpoints" / newest) if int(step) else "")
    assert message.startswith(f"small: {name}, the newest checkpoint is {newest if int(step) else 'step 0'}")
    assert int(step) == max(
        number for name, number in {"step_0000010": 10, "step_0000004": 4, "": 0}.items() if name in during
    )
    assert name not in ("failed", "requeued") or line.split(":")[0] in message
    assert message.split(", ", 1)[1] in (tmp_path / "run" / "logs" / "hook.log").read_text()


def test_a_request_before_the_ranks_start_reaches_them(run_values: dict[str, Any], tmp_path: Path) -> None:
    ranks = f"for _ in {{1..40}}; do [[ -s signals ]] && break; sleep; done; {SAVE_4}"
    for signal, code, line in (("USR2", 130, "stopped, the newest checkpoint is step_0000004"), ("USR1", 0, QUEUED)):
        folder = tmp_path / signal
        folder.mkdir()
        train = render_small(run_values, folder, setup=[f"kill -{signal} $$"])
        done = run_script(train, folder, DURING=ranks)
        assert done.returncode == code, done.stdout + done.stderr
        assert line in done.stdout.splitlines()[-1]
        assert (folder / "signals").read_text().startswith("--signal=TERM 20007\n")


def test_the_signal_is_repeated_after_a_failed_scancel(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    ranks = f"kill -USR1 $$; for _ in {{1..40}}; do (($(wc -l <signals) > 2)) && break; sleep; done; {SAVE_4}"
    assert QUEUED in run_script(train, tmp_path, DURING=ranks).stdout
    assert (tmp_path / "signals").read_text().splitlines()[:3] == ["--signal=TERM 20007"] * 3


def test_a_port_in_use_is_replaced_by_one_far_away(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    for job, base, port in ((20007, 12007, 19926), (35000, 27000, 14919)):
        with socket.create_server(("127.0.0.1", base)):
            (tmp_path / "calls").unlink(missing_ok=True)
            run_script(train, tmp_path, FIRST="127.0.0.1", SLURM_JOB_ID=str(job))
        assert f"127.0.0.1:{port}" in (tmp_path / "calls").read_text().split("\0")


def test_a_job_whose_nodes_have_no_names_says_so(run_values: dict[str, Any], tmp_path: Path) -> None:
    done = run_script(render_small(run_values, tmp_path, setup=["scontrol() { return 1; }"]), tmp_path)
    assert (done.returncode, (tmp_path / "calls").exists()) == (3, False)
    assert "scontrol names no host of n: read the lines above, then: trainshort jobs resume run" in done.stdout


def test_a_failed_requeue_is_repeated_a_few_times(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    done = run_script(train, tmp_path, DURING=LIMIT + SAVE_4, REFUSALS="2")
    assert (done.returncode, len((tmp_path / "requeues").read_text())) == (0, 3)
    assert QUEUED in done.stdout.splitlines()[-1]
    done = run_script(train, tmp_path, DURING=LIMIT + "mkdir run/checkpoints/step_0000006", REFUSALS="99")
    assert (done.returncode, len((tmp_path / "requeues").read_text())) == (1, 15)
    assert "queueing" not in done.stdout
    assert done.stdout.endswith(
        "time limit, but SLURM does not queue this again; the newest checkpoint is step_0000006: "
        "trainshort jobs resume run\n"
    )


def test_saving_a_step_again_is_progress(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    broken = tmp_path / "run" / "checkpoints" / "step_0000008"
    broken.mkdir(parents=True)
    os.utime(broken, (1, 1))
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + SAVE_4).stdout
    save_again = "sleep; touch run/checkpoints/step_0000004"
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + save_again).stdout, "the same step, saved again"
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + save_again).stdout
    assert "no progress" in run_script(train, tmp_path, DURING=LIMIT).stdout


def test_a_failed_save_shows_the_errors_of_the_ranks(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    fail = "echo 'error: the disk is full' >run/logs/rank_0.log; exit 3"
    told = render_small({**run_values, "track": {"hook": HOOK + "; exit 5"}}, tmp_path)
    done = run_script(told, tmp_path, DURING=STOP + fail)
    assert done.stdout.splitlines()[-2] == "error: the disk is full"
    assert done.stdout.splitlines()[-1].endswith("track.hook failed at 'failed' (exit code 5): see run/logs/hook.log")
    message = "small: failed, the newest checkpoint is step 0: the disk is full\n"
    assert (done.returncode, (tmp_path / "events").read_text().split("|")[-1]) == (3, message)
    (tmp_path / "run" / "slurm" / "starts").unlink()
    for request, code in ((STOP, 3), (LIMIT, 1)):
        done = run_script(train, tmp_path, DURING=request + fail)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "error: the disk is full")
    (tmp_path / "run" / "slurm" / "starts").unlink()
    # An error of several lines is whole. Ranks that only lost the others are left out, and errors of earlier starts.
    lost = "error: rank %s lost its connection to the other ranks: the cause is elsewhere"
    fail = "".join(f"echo '{lost % rank}' >>run/logs/rank_{rank}.log; " for rank in (0, 2))
    memory = "error: rank 1 ran out of memory\n  held: 5 GB\n  change:\n    train.micro_batch 8 -> 4\n  or more"
    done = run_script(train, tmp_path, DURING=f"{fail}echo '{memory}' >run/logs/rank_1.log; exit 3")
    assert done.stdout.endswith(f": read run/logs/rank_*.log\n{memory}\n")


def test_the_hook_is_told_of_a_job_that_is_killed(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small({**run_values, "track": {"hook": HOOK}}, tmp_path)
    run_script(train, tmp_path, DURING=SAVE_4 + "kill -TERM $$; command sleep 0.3")
    (event,) = (tmp_path / "events").read_text().splitlines()
    assert event.startswith("failed|4|")
    assert event.endswith("|small: failed, the newest checkpoint is step_0000004: this script was killed")


def test_a_hook_log_that_cannot_be_written_changes_nothing(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small({**run_values, "track": {"hook": HOOK + "; echo something"}}, tmp_path)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "hook.log").symlink_to("/dev/full")
    assert run_script(train, tmp_path, DURING=SAVE_ALL).returncode == 0, "else the evaluation would not start"
    assert (tmp_path / "events").read_text().startswith("finished|10|")


def test_an_error_of_an_earlier_start_is_not_repeated(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small({**run_values, "track": {"hook": HOOK}}, tmp_path)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank_0.log").write_text("error: the node was cold\n")
    os.utime(logs / "rank_0.log", (1, 1))
    for rank in (2, 3):  # this start writes to them too
        (logs / f"rank_{rank}.log").write_text("error: the node was cold\n")
    steps = "for rank in 2 3; do printf '%s\n' {1..9} >>run/logs/rank_$rank.log; done;"
    fail = "echo 'error: the loss is nan' >>run/logs/rank_1.log; exit 1"
    done = run_script(train, tmp_path, DURING=f"command sleep 0.1; {steps} {fail}")
    *_, summary, error = done.stdout.splitlines()
    assert summary.endswith("failed with exit code 1: read run/logs/rank_*.log")
    assert error == "error: the loss is nan"
    assert (tmp_path / "events").read_text().endswith("the newest checkpoint is step 0: the loss is nan\n")


@pytest.mark.parametrize(
    ("during", "nodes", "silent", "code", "line"),
    [
        ("exit 137", "mixed", "233", 137, "a node is lost: queueing again from step 0"),
        (SAVE_4 + "exit 1", "mixed", "124", 1, f"a node is lost: {QUEUED}"),
        (LIMIT + "exit 1", "mixed", "1", 1, "a node is lost: queueing again from step 0"),
        ("exit 137", "mixed", "0", 137, "failed with exit code 137"),
        *(("exit 1", state, "0", 1, "a node is lost: ") for state in ("mixed*", "draining", "mixed\ndown", "failing")),
        ("exit 2", "down", "1", 2, "failed with exit code 2"),
        ("exit 3", "down", "1", 3, "failed with exit code 3"),
        (STOP + "exit 137", "down", "1", 137, "asked to stop, but the save failed with exit code 137"),
        (STOP, "down", "1", 130, "stopped, the newest checkpoint is step 0"),
    ],
)
def test_a_job_whose_node_is_lost_queues_again(
    run_values: dict[str, Any], tmp_path: Path, during: str, nodes: str, silent: str, code: int, line: str
) -> None:
    train = render_small(run_values, tmp_path)
    done = run_script(train, tmp_path, DURING=during, NODES=nodes, SILENT=silent)
    assert (done.returncode, line in done.stdout.splitlines()[-1]) == (code, True), done.stdout + done.stderr
    if nodes == "mixed" and code not in (2, 3):
        # One task on each node, which shares CPUs and memory with processes that may still run there.
        probe = "60 srun --overlap --mem=0 --nodes=1 --ntasks=1 --ntasks-per-node=1 true\n"
        assert (tmp_path / "probes").read_text() == probe


def test_the_command_that_a_job_prints_can_be_typed(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"], run_values["slurm"] = "my run", {}
    config = check_run(run_values, name="small")
    train = render_scripts(config, run_file="small.yaml", nodes=1, folder=tmp_path)["train"]
    done = run_script(train, tmp_path, DURING="mkdir -p 'my run/checkpoints/step_0000004'")
    assert done.stdout.endswith("stopped, the newest checkpoint is step_0000004: trainshort jobs resume my\\ run\n")


def test_a_stop_ends_a_requeue_that_is_being_repeated(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    done = run_script(train, tmp_path, DURING=LIMIT + SAVE_4, REFUSALS="99", REQUEUEING="kill -USR2 $$")
    assert (done.returncode, (tmp_path / "requeues").read_text()) == (130, "\n")
    assert "stopped, the newest checkpoint is step_0000004: trainshort jobs resume run" in done.stdout.splitlines()[-1]


def test_a_stopped_job_that_slurm_restarts_stops_at_once(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    stop = tmp_path / "run" / "slurm" / "stop"
    stop.parent.mkdir(parents=True)
    stop.write_text("20007\n")
    done = run_script(train, tmp_path)
    assert (done.returncode, (tmp_path / "calls").exists(), stop.exists()) == (130, False, False)
    assert done.stdout.endswith("stopped, the newest checkpoint is step 0: trainshort jobs resume run\n")
    stop.write_text("20006\n")
    assert "start 0 from step 0" in run_script(train, tmp_path).stdout, "the file names another job"
    stop.write_text("20007\n")
    (tmp_path / "run" / "checkpoints" / "step_0000010").mkdir(parents=True)
    assert "trained to the last step" in run_script(train, tmp_path).stdout, "finished is finished"


def test_the_fourth_start_from_one_checkpoint_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    for _ in range(3):
        assert "failed with exit code 9" in run_script(train, tmp_path, DURING="exit 9").stdout
    refused = run_script(train, tmp_path, DURING="exit 9")
    assert refused.returncode == 1
    assert "no progress: three starts went no further than step 0; read run/logs/rank_*.log, then: " in refused.stdout
    assert "start" in run_script(train, tmp_path, SLURM_JOB_ID="20008").stdout, "another job starts from 0"
    (tmp_path / "run" / "checkpoints" / "step_0000004").mkdir(parents=True)
    assert "from step_0000004" in run_script(train, tmp_path).stdout, "a checkpoint is progress"


def test_an_older_export_is_moved_away(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"] = "run"
    export = render_scripts(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)[
        "export"
    ]
    (tmp_path / "run" / "export" / "hf").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000010"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (0, 0))
    assert "step_0000010 is exported already: run/export/hf" in run_script(export, tmp_path).stdout
    assert not (tmp_path / "calls").exists()
    os.utime(checkpoint)
    os.utime(tmp_path / "run" / "export" / "hf", (0, 0))
    run_script(export, tmp_path)
    assert (tmp_path / "calls").exists()
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["hf.before-20007"]
