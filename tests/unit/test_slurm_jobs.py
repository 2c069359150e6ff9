"""Submitting, watching, stopping and resuming a chain, with SLURM's commands stubbed; tests/slurm has the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from configs.load import check_run
from configs.paths import chain_file, frozen_code, slurm_folder, slurm_stop_file
from data_pipeline.atomic import one_writer
from launch import chain, jobs
from launch.chain import Chain, freeze, read_chain, sole_submission, submit
from launch.cluster import Job, check_limits, find_job, job_of
from launch.slurm import CHAIN
from tests.unit.command_line import Call
from training.versions import CODE, HOUSE, SOURCE, VERSIONS, check_frozen, source_code

RUNNING = (
    "JobId=7 JobName=a-train UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=0:0 RunTime=00:10:30 TimeLimit=1-00:00:00 NodeList=gpu[1-4] BatchHost=gpu1 NumNodes=4 "
    "TRES=cpu=4,mem=4000M"
)
PARTITIONS = """\
PartitionName=big AllowGroups=ALL Default=YES MaxNodes=2 MaxTime=1-00:00:00 TotalNodes=8 State=UP
PartitionName=small AllowGroups=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED TotalNodes=3 State=UP
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make commands of SLURM that do what a line of bash says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, body: str) -> None:
        program = folder / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)

    return make


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


def test_each_job_starts_when_the_one_before_has_ended_well(
    run_values: dict[str, Any], tmp_path: Path, stub: Any
) -> None:
    calls = tmp_path / "calls"
    stub("sbatch", f'echo "$@" >>{calls}; echo "$((200 + $(wc -l <{calls})));cluster"')
    run_dir = submitted(run_values, tmp_path)
    found = submit(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN)
    assert found == read_chain(run_dir).jobs == {"train": "201", "evaluate": "202", "export": "203"}
    folder, kill = run_dir / "slurm", "--kill-on-invalid-dep=yes"
    assert calls.read_text().splitlines() == [
        f"--parsable --job-name=small-train {folder}/train.sbatch",
        f"--parsable --job-name=small-evaluate --dependency=afterok:201 {kill} {folder}/evaluate.sbatch",
        f"--parsable --job-name=small-export --dependency=afterok:202 {kill} {folder}/export.sbatch",
    ]


def test_a_refused_script_is_named_and_those_before_it_are_cancelled(
    run_values: dict[str, Any], tmp_path: Path, stub: Any
) -> None:
    run_dir = submitted(run_values, tmp_path)
    chain = read_chain(run_dir)
    stub("sbatch", 'echo "sbatch: error: no such qos" >&2; exit 1')
    with pytest.raises(MachineError, match=r"sbatch refused .*train.sbatch: no such qos: mend the slurm section"):
        submit(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN)
    assert read_chain(run_dir) == chain, "the record stays that of the jobs before"
    stub("sbatch", '[[ $3 == --dep* ]] || { echo 7; exit 0; }; echo "sbatch: error: no such qos" >&2; exit 1')
    stub("scancel", f'echo "$@" >{tmp_path}/cancelled')
    with pytest.raises(MachineError, match=r"sbatch refused .*evaluate.sbatch: no such qos: mend the slurm section"):
        submit(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert read_chain(run_dir).jobs == {"train": "7"}, "a job that was taken is recorded, whatever comes then"


def test_what_was_submitted_is_frozen(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    code = frozen_code(run_dir)
    assert sorted(path.name for path in code.iterdir()) == sorted([*CODE, SOURCE, VERSIONS])
    assert (code / "launch" / "slurm.py").read_bytes() == (HOUSE / "launch" / "slurm.py").read_bytes()
    assert not list(code.rglob("__pycache__"))
    assert source_code(code) == source_code() is not None
    run_values["slurm"] = {"container": "image.sqsh"}
    freeze(check_run(run_values, name="small"))
    assert not code.exists(), "what is installed here is not what is in the image"


def test_an_installed_wheel_is_frozen_like_a_checkout(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    for name in (*CODE[:-1], "torch", "training/__pycache__"):
        (installed / name).mkdir(parents=True)
        (installed / name / "module.py").write_text("here")
    (installed / CODE[-1]).touch()
    monkeypatch.setattr(chain, "HOUSE", installed)
    monkeypatch.setattr(chain, "source_code", lambda: source_code(installed))
    code = frozen_code(submitted(run_values, tmp_path))
    assert sorted(path.name for path in code.iterdir()) == sorted([*CODE, VERSIONS])
    assert [path.relative_to(code) for path in code.glob("training/**/*.py")] == [Path("training/module.py")]


def test_a_wheel_in_another_repository_is_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "trainshort.py").touch()
    assert source_code(tmp_path) is None


def test_the_diff_makes_the_checkout_of_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str, folder: Path) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)

    checkout, again = tmp_path / "checkout", tmp_path / "again"
    (checkout / "training").mkdir(parents=True)
    (checkout / "trainshort.py").write_text("one\n")
    git("init", "-q", folder=checkout)
    git("add", ".", folder=checkout)
    git("commit", "-q", "-m", "first", folder=checkout)
    (checkout / "trainshort.py").write_text("two\n")
    (checkout / "training" / "new module.py").write_text("new\n")
    (checkout / "notes.py").write_text("none of the packages' code\n")
    found = source_code(checkout)
    assert found is not None
    git("clone", "-q", str(checkout), str(again), folder=tmp_path)
    (tmp_path / "diff").write_text(found["diff"])
    git("apply", str(tmp_path / "diff"), folder=again)
    files = {path.relative_to(again): path.read_text() for path in again.rglob("*.py")}
    assert files == {Path("trainshort.py"): "two\n", Path("training/new module.py"): "new\n"}


def test_other_packages_than_submitted_with_are_refused_by_name(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    code = frozen_code(run_dir)
    check_frozen(code)
    seen = json.loads((code / VERSIONS).read_text())
    (code / VERSIONS).write_text(json.dumps({**seen, "trainshort": "0.0.1"}))
    check_frozen(code)  # its own code is what was frozen
    (code / VERSIONS).write_text(json.dumps({**seen, "torch": "2.1"}))
    check_frozen()
    for command in ("train", "evaluate", "export"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainshort", command, "--help"],
            env={**os.environ, "PYTHONPATH": str(code)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == (
            f"error: {run_dir} was submitted with other versions (torch is {seen['torch']}, was 2.1): install those, "
            "or submit it again with trainshort slurm to go on with these\n"
        )


def test_two_submissions_at_once_do_not_mix(run_values: dict[str, Any], tmp_path: Path, trainshort: Call) -> None:
    run_dir = submitted(run_values, tmp_path)
    before = chain_file(run_dir).read_bytes()
    with one_writer(slurm_folder(run_dir), on_wait=pytest.fail):
        answer = trainshort("jobs", "resume", str(run_dir))
    assert (answer.code, answer.error) == (
        2,
        f"error: {run_dir} is being submitted by another process: wait for it, then see "
        f"trainshort jobs status {run_dir}\n",
    )
    assert chain_file(run_dir).read_bytes() == before


def test_a_refused_submission_leaves_what_is_frozen(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(run_values, tmp_path)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for name in ("sbatch", "scontrol"):
        stub(name, "exit 1")
    monkeypatch.setattr(chain, "_settled", lambda config, nodes: config)
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of"):
        chain.submit_run(check_run(run_values, name="small"), nodes=3, folder=tmp_path)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_data_that_is_not_prepared_is_refused_with_a_container_too(
    run_values: dict[str, Any], tmp_path: Path, stub: Any
) -> None:
    for name in ("sbatch", "scontrol"):
        stub(name, "exit 1")
    run_values["slurm"] = {"container": "image.sqsh"}
    run_values["data"]["dir"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere.*prepare"):
        chain.submit_run(check_run(run_values, name="small"), nodes=1, folder=tmp_path)
    assert not Path(run_values["run"]["dir"]).exists()


def test_a_folder_that_cannot_be_written_is_one_line(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.touch()
    with pytest.raises(MachineError, match=rf"run folder {run_dir} cannot be written \(Not a directory\): free space"):
        submitted(run_values, tmp_path)


def test_a_job_is_read_from_what_scontrol_says() -> None:
    assert job_of(RUNNING) == Job("7", "RUNNING", restarts=2, nodes="gpu[1-4]", seconds_left=24 * 3600 - 630)
    killed = job_of("JobId=9 JobState=FAILED Reason=JobLaunchFailure ExitCode=0:12")
    assert (killed.exit_code, killed.signal) == (0, 12)
    waiting = job_of(
        "JobId=8 JobState=PENDING Reason=PartitionNodeLimit Restarts=0 ExitCode=0:0 RunTime=00:00:00 "
        "TimeLimit=UNLIMITED NodeList=(null)"
    )
    assert waiting == Job("8", "PENDING", "PartitionNodeLimit")
    assert not waiting.ended


def test_a_job_that_the_controller_has_forgotten_is_asked_of_the_accounting(stub: Any) -> None:
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert find_job("7", name="a-train") == Job("7", "UNKNOWN")
    rows = ("REQUEUED|0:0|gpu[1-2]|a-train", "CANCELLED by 0|3:15|gpu[3-4]|a-train", "RUNNING|0:0|gpu9|b|train")
    stub("sacct", "; ".join(f"echo '{row}'" for row in rows))
    seen = Job("7", "CANCELLED", restarts=1, exit_code=3, signal=15, nodes="gpu[3-4]")
    assert find_job("7", name="a-train") == seen
    stub("scontrol", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(MachineError, match=r"SLURM does not answer: Unable to contact slurm controller"):
        find_job("7", name="a-train")


def test_a_job_of_another_name_is_not_ours(stub: Any) -> None:
    stub("scontrol", f"echo '{RUNNING}'")
    assert find_job("7", name="a-train").state == "RUNNING"
    assert find_job("7", name="b-train") == Job("7", "UNKNOWN"), "the controller began to count anew"


@pytest.mark.parametrize(
    ("slurm", "nodes", "message"),
    [
        ({"partition": "nosuch"}, 1, "slurm.partition 'nosuch' is not on this cluster: set slurm.partition to big or"),
        ({}, 3, r"--nodes 3 is more than partition big gives a job \(2\): use 2 or fewer"),
        ({"partition": "small"}, 4, r"--nodes 4 is more than partition small gives a job \(3\): use 3 or fewer"),
        ({"time": "2-00:00:00"}, 1, "slurm.time 2-00:00:00 is over the limit of partition big: use 1-00:00:00 or less"),
        ({"memory": "3T"}, 1, r"slurm.memory 3T is more than a node of partition big has \(2000000M\): use 2000000M"),
        ({"partition": "big", "extra": ["-p small"]}, 4, r"--nodes 4 is more than partition small gives a job \(3\)"),
        (
            {"extra": ["--exclusive --partition=no"]},
            1,
            "slurm.extra 'no' is not on this cluster: set slurm.extra to big",
        ),
        ({"partition": "small", "qos": "long"}, 4, r"--nodes 4 is more than partition small gives a job \(3\)"),
    ],
)
def test_what_a_partition_cannot_give_is_refused(
    run_values: dict[str, Any], stub: Any, slurm: dict[str, Any], nodes: int, message: str
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000; echo 2000000+")
    run_values["slurm"] = slurm
    with pytest.raises(InputError, match=message):
        check_limits(check_run(run_values, name="small").slurm, nodes=nodes)


def test_what_a_partition_can_give_passes(run_values: dict[str, Any], stub: Any) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000")
    for slurm in ({"memory": "400G"}, {"partition": "small", "time": "9-00:00:00"}, {"partition": "small,big"}):
        run_values["slurm"] = slurm
        check_limits(check_run(run_values, name="small").slurm, nodes=2)


@pytest.mark.parametrize(
    ("slurm", "variables"),
    [
        ({"qos": "long"}, {}),
        ({"extra": ["--qos=long"]}, {}),
        ({"extra": ["-qlong"]}, {}),
        ({}, {"SBATCH_QOS": "long"}),
        ({"extra": ["-p small", "--mem-per-cpu=1G"]}, {}),
        ({"extra": ["-N 2", "-t1-00:00:00", "--mem=0"]}, {}),
        ({"extra": ["--nodes=2", "--mem 0"]}, {"SBATCH_TIMELIMIT": "60"}),
        ({"extra": ["--mem=0", "-p big"]}, {"SBATCH_PARTITION": "small"}),
    ],
)
def test_what_options_of_ones_own_decide_is_left_to_sbatch(
    run_values: dict[str, Any],
    stub: Any,
    monkeypatch: pytest.MonkeyPatch,
    slurm: dict[str, Any],
    variables: dict[str, str],
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Too long, too many nodes and too much memory for `big`; `small` has no limits but its nodes and their memory.
    memory = {"memory": "501G"} if any("mem" in line for line in slurm.get("extra", [])) else {}
    run_values["slurm"] = {"time": "2-00:00:00", **memory, **slurm}
    check_limits(check_run(run_values, name="small").slurm, nodes=3)


def test_a_partition_of_the_environment_is_named(
    run_values: dict[str, Any], stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    monkeypatch.setenv("SBATCH_PARTITION", "no")
    run_values["slurm"] = {"partition": "big"}
    with pytest.raises(InputError, match="SBATCH_PARTITION 'no' is not on this cluster: set SBATCH_PARTITION to big"):
        check_limits(check_run(run_values, name="small").slurm, nodes=1)


def test_no_second_chain_beside_one_that_runs(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{show(101, 'COMPLETED')}; {show(102, 'PENDING')}; {show(103, 'PENDING')}; true")
    with pytest.raises(InputError, match=r"has job 102 \(evaluate, PENDING\) already: wait for it, or end it with"):
        chain.refuse_active(run_dir)
    chain.refuse_active(tmp_path)


def test_status_shows_the_chain_and_says_what_to_do(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{RUNNING_101}; {show(102, 'PENDING', Reason='Dependency')}; {show(103, 'PENDING')}; true")
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 3, "loss": 5.5}\n{"step": 4, "loss": 5.25}\n{"step": 5, "lo')
    answer = trainshort("jobs", "status", str(run_dir))
    assert (answer.code, answer.error) == (0, "")
    header, _, train, evaluate, export = [line.split() for line in answer.out.splitlines() if line.strip()]
    assert header == ["job", "state", "restarts", "step", "loss", "time", "left", "nodes"]
    assert train == ["train", "101", "RUNNING", "2", "4/10", "5.2500", "23:49:30", "gpu[1-4]"]
    assert evaluate == ["evaluate", "102", "PENDING", "0", "-", "(Dependency)"]
    assert export == ["export", "103", "PENDING", "0", "-"]
    stub(
        "scontrol", f"{show(101, 'FAILED', ExitCode='130:0')}; {show(102, 'CANCELLED')}; {show(103, 'CANCELLED')}; true"
    )
    found = json.loads(trainshort("jobs", "status", str(run_dir), "--json").out)
    assert found["jobs"][0]["state"] == "STOPPED"
    assert (found["step"], found["loss"], found["steps"]) == (4, 5.25, 10)
    assert found["advice"] == f"stopped: trainshort jobs resume {run_dir} goes on"


@pytest.mark.parametrize(
    ("train", "evaluate", "advice"),
    [
        (
            show(101, "RUNNING"),
            show(102, "CANCELLED"),
            "evaluate is cancelled: once train has ended, trainshort jobs resume {run_dir} submits what is left",
        ),
        (
            show(101, "PENDING", Reason="launch_failed_requeued_held"),
            show(102, "PENDING", Reason="Dependency"),
            "train is held (launch failed requeued held): see why in sinfo -R and {run_dir}/logs/slurm-train-101.log, "
            "then scontrol release 101",
        ),
        (
            show(101, "COMPLETED"),
            show(102, "PENDING", Reason="JobHeldUser"),
            "evaluate is held (JobHeldUser): see why in sinfo -R and {run_dir}/logs/slurm-evaluate-102.log, "
            "then scontrol release 102",
        ),
        (show(101, "PENDING", Reason="Resources"), show(102, "PENDING", Reason="Dependency"), None),
        *(
            (show(101, "PENDING", Reason=reason), show(102, "PENDING", Reason="Dependency"), None)
            for reason in ("AssocGrpGRES", "QOSGrpNodeLimit", "QOSMaxJobsPerUserLimit", "QOSMaxCpuPerUserLimit")
        ),
        *(
            (
                show(101, "PENDING", Reason=reason),
                show(102, "PENDING", Reason="Dependency"),
                f"train will never start as it is ({reason}): trainshort jobs stop {{run_dir}}, change the slurm "
                "section, and submit again",
            )
            for reason in ("PartitionNodeLimit", "QOSMaxWallDurationPerJobLimit", "AssocMaxNodePerJobLimit")
        ),
        (
            show(101, "PENDING", Reason="ReqNodeNotAvail,_UnavailableNodes:gpu2"),
            show(102, "PENDING", Reason="Dependency"),
            "train waits for 2 nodes with what its script asks for (ReqNodeNotAvail, UnavailableNodes:gpu2): see sinfo",
        ),
        (
            show(101, "FAILED", ExitCode="0:12"),
            show(102, "CANCELLED"),
            "stopped: trainshort jobs resume {run_dir} goes on",
        ),
        (
            show(101, "FAILED", ExitCode="1:0"),
            show(102, "CANCELLED"),
            "train ended FAILED: read {run_dir}/logs/slurm-train-101.log, then trainshort jobs resume {run_dir}",
        ),
    ],
)
def test_advice_fits_what_the_jobs_do(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, train: str, evaluate: str, advice: str | None
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{train}; {evaluate}; {show(103, 'PENDING', Reason='Dependency')}; true")
    assert jobs.status(run_dir).advice == (advice and advice.format(run_dir=run_dir))


RUNNING_101 = f"[[ $4 == 101 ]] && echo '{RUNNING.replace('JobId=7 JobName=a', 'JobId=101 JobName=small')}'"


@pytest.mark.parametrize(
    ("train", "calls"),
    [
        (show(101, "RUNNING"), ["103", "102", "--batch --signal=USR2 101"]),
        (show(101, "PENDING"), ["103", "102", "101"]),
        (show(101, "COMPLETED"), ["103", "102"]),
    ],
)
def test_stop_asks_a_training_to_save_and_cancels_what_waits(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call, train: str, calls: list[str]
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{train}; {show(102, 'PENDING')}; {show(103, 'PENDING')}; true")
    stub("scancel", f'echo "$@" >>{tmp_path}/calls')
    answer = trainshort("jobs", "stop", str(run_dir))
    assert answer.code == 0
    assert (tmp_path / "calls").read_text().splitlines() == calls
    # A training that is queued again by then reads there that it was stopped.
    marked = slurm_stop_file(run_dir)
    assert (marked.read_text() if marked.exists() else None) == ("101\n" if "--batch" in calls[-1] else None)
    stub("scancel", 'echo "scancel: error: Kill job error on job id 103: Access/permission denied" >&2; exit 1')
    answer = trainshort("jobs", "stop", str(run_dir))
    assert answer.code == 3
    assert answer.error.startswith("error: job 103 (export) cannot be stopped: Kill job error on job id 103: Access/")


def test_only_what_is_left_is_submitted_again(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    assert jobs.remaining(run_dir) == ("train", "evaluate", "export")
    last = run_dir / "checkpoints" / "step_0000010"
    last.mkdir(parents=True)
    assert jobs.remaining(run_dir) == ("evaluate", "export")
    report = write_report(run_dir)
    assert jobs.remaining(run_dir) == ("export",)
    (run_dir / "export" / "hf").mkdir(parents=True)
    assert jobs.remaining(run_dir) == ()
    os.utime(report, (0, 0))
    assert jobs.remaining(run_dir) == ("evaluate", "export"), "an evaluation of an older checkpoint"


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, ()),
        ({"checkpoint": "run/checkpoints/step_0000008"}, ("evaluate", "export")),
        ({"lengths": (32, 64, 128)}, ("evaluate", "export")),
        ({"lengths": (32, 64, 128, 256, 512)}, ()),
        ({"stride": 8}, ("evaluate", "export")),
    ],
)
def test_a_report_that_somebody_made_by_hand_counts_where_it_has_all(
    run_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], left: tuple[str, ...]
) -> None:
    run_values["evaluate"] = {"protocols": ["nonoverlapping", "sliding:16"]}
    run_dir = submitted(run_values, tmp_path)
    (run_dir / "checkpoints" / "step_0000010").mkdir(parents=True)
    (run_dir / "export" / "hf").mkdir(parents=True)
    report = write_report(run_dir, **changes)
    assert jobs.remaining(run_dir) == left
    report.write_text('{"results": [')
    assert jobs.remaining(run_dir) == ("evaluate", "export")


def write_report(
    run_dir: Path,
    *,
    checkpoint: str = "/elsewhere/run/checkpoints/step_0000010",
    lengths: tuple[int, ...] = (32, 64, 128, 256),
    stride: int = 16,
) -> Path:
    """Write as much of a report as says what was measured."""
    results = [
        {"length": length, "protocol": protocol, "stride": stride if protocol == "sliding" else length}
        for length in lengths
        for protocol in ("nonoverlapping", "sliding")
    ]
    report = run_dir / "evaluation" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"checkpoint": checkpoint, "results": results}))
    return report


def test_a_partial_resume_keeps_the_row_of_what_is_done(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call
) -> None:
    run_dir = submitted(run_values, tmp_path)
    (run_dir / "checkpoints" / "step_0000010").mkdir(parents=True)
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    log = run_dir / "logs" / "slurm-evaluate-102.log"
    assert jobs.status(run_dir).advice == (
        f"SLURM has forgotten evaluate: read {log}, then trainshort jobs resume {run_dir}"
    )
    stub("sbatch", "[[ $2 == *-evaluate ]] && echo 112 || echo 113")
    answer = trainshort("jobs", "resume", str(run_dir))
    assert answer.out.splitlines()[:2] == ["submitted evaluate: job 112", "submitted export: job 113"]
    assert read_chain(run_dir).jobs == {"train": "101", "evaluate": "112", "export": "113"}
    write_report(run_dir)
    (run_dir / "export" / "hf").mkdir(parents=True)
    found = jobs.status(run_dir)
    assert (list(found.jobs), found.advice) == (["train", "evaluate", "export"], None)
    assert trainshort("jobs", "resume", str(run_dir)).out.endswith("nothing is left to do\n")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"run": "small", "jobs": ["101"], "nodes": 2, "submitted_at": "now"}', "jobs: Input should be an object"),
        ('{"jobs": {}, "nodes": 2, "submitted_at": "now"}', "run: Field required"),
        ("{", ": Invalid JSON"),
    ],
)
def test_a_broken_record_is_one_line(
    run_values: dict[str, Any], tmp_path: Path, trainshort: Call, record: str, reason: str
) -> None:
    run_dir = submitted(run_values, tmp_path)
    chain_file(run_dir).write_text(record)
    for command in ("status", "stop", "resume"):
        answer = trainshort("jobs", command, str(run_dir))
        assert (answer.code, answer.out, len(answer.error.splitlines())) == (2, "", 1)
        assert answer.error.startswith(f"error: {chain_file(run_dir)} is broken ({reason}")
        assert answer.error.endswith("no job of the run is left, then remove the file and submit the run again\n")


@pytest.mark.parametrize("command", ["status", "stop", "resume"])
def test_a_folder_without_jobs_is_named(tmp_path: Path, trainshort: Call, command: str) -> None:
    missing = trainshort("jobs", command, str(tmp_path / "no"))
    assert (missing.code, missing.error) == (
        2,
        f"error: run folder {tmp_path / 'no'} does not exist: give the run.dir of a run\n",
    )
    empty = trainshort("jobs", command, str(tmp_path))
    assert empty.code == 2
    assert empty.error.startswith(f"error: {tmp_path} has no submitted jobs: submit them with trainshort slurm")
