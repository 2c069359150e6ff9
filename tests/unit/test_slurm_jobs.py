"""Submitting, watching, stopping and resuming a chain, with SLURM's commands stubbed; tests/slurm has the real ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from configs.load import check_run
from configs.paths import chain_file, frozen_code, frozen_config, frozen_versions
from launch import chain, jobs
from launch.chain import CODE, check_frozen, freeze, read_chain, submit
from launch.cluster import Job, check_limits, find_job, job_of
from launch.slurm import CHAIN
from tests.unit.command_line import Call
from training.versions import HOUSE, source_code

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
    freeze(check_run(run_values, name="small"))
    record = {"jobs": {"train": "101", "evaluate": "102", "export": "103"}, "nodes": 2, "submitted_at": "now"}
    chain_file(run_dir).write_text(json.dumps(record))
    return run_dir


def show(number: int, state: str, **fields: str) -> str:
    words = " ".join(f"{key}={value}" for key, value in fields.items())
    return f"[[ $4 == {number} ]] && echo 'JobId={number} JobName=a JobState={state} {words}'"


def test_each_job_starts_when_the_one_before_has_ended_well(
    run_values: dict[str, Any], tmp_path: Path, stub: Any
) -> None:
    calls = tmp_path / "calls"
    stub("sbatch", f'echo "$@" >>{calls}; echo "$((100 + $(wc -l <{calls})));cluster"')
    run_dir = submitted(run_values, tmp_path)
    found = submit(run_dir, names=CHAIN, nodes=2)
    assert found.jobs == {"train": "101", "evaluate": "102", "export": "103"}
    assert read_chain(run_dir) == found
    folder = run_dir / "slurm"
    assert calls.read_text().splitlines() == [
        f"--parsable {folder}/train.sbatch",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
        f"--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes {folder}/export.sbatch",
    ]


def test_a_refused_script_is_named_and_those_before_it_are_cancelled(
    run_values: dict[str, Any], tmp_path: Path, stub: Any
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("sbatch", '[[ $2 == --dep* ]] || { echo 7; exit 0; }; echo "sbatch: error: no such qos" >&2; exit 1')
    stub("scancel", f'echo "$@" >{tmp_path}/cancelled')
    with pytest.raises(MachineError, match=r"sbatch refused .*evaluate.sbatch: no such qos: mend the slurm section"):
        submit(run_dir, names=CHAIN, nodes=2)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert read_chain(run_dir).jobs["train"] == "101", "the record stays that of the jobs before"


def test_what_was_submitted_is_frozen(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    code = frozen_code(run_dir)
    assert sorted(path.name for path in code.iterdir()) == sorted([*CODE, "source.json"])
    assert (code / "launch" / "slurm.py").read_bytes() == (HOUSE / "launch" / "slurm.py").read_bytes()
    assert not list(code.rglob("__pycache__"))
    assert source_code(code) == source_code() is not None
    run_values["slurm"] = {"container": "image.sqsh"}
    assert freeze(check_run(run_values, name="small")) is None, "what is installed here is not what is in the image"
    assert not code.exists()
    assert not frozen_versions(run_dir).exists()


def test_a_wheel_in_another_repository_is_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "trainshort.py").touch()
    assert source_code(tmp_path) is None


def test_other_versions_than_submitted_are_refused_by_name(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    config = check_run(run_values, name="small")
    check_frozen(config, run=str(frozen_config(run_dir)))
    versions = json.loads(frozen_versions(run_dir).read_text())
    frozen_versions(run_dir).write_text(json.dumps({**versions, "torch": "2.1"}))
    check_frozen(config, run="small.yaml")
    expected = (
        rf"submitted with other versions \(torch is {versions['torch'].replace('+', '.')}, was 2.1\): install those"
    )
    with pytest.raises(MachineError, match=expected):
        check_frozen(config, run=os.path.relpath(frozen_config(run_dir)))


def test_a_job_is_read_from_what_scontrol_says() -> None:
    assert job_of(RUNNING) == Job("7", "RUNNING", "", 2, 0, "gpu[1-4]", 24 * 3600 - 630)
    waiting = job_of(
        "JobId=8 JobState=PENDING Reason=PartitionNodeLimit Restarts=0 ExitCode=0:0 RunTime=00:00:00 "
        "TimeLimit=UNLIMITED NodeList=(null)"
    )
    assert waiting == Job("8", "PENDING", "PartitionNodeLimit")
    assert not waiting.ended


def test_a_job_that_the_controller_has_forgotten_is_asked_of_the_accounting(stub: Any) -> None:
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert find_job("7") == Job("7", "UNKNOWN")
    stub("sacct", 'echo "REQUEUED|0:0|gpu[1-2]"; echo "CANCELLED by 0|3:15|gpu[3-4]"')
    assert find_job("7") == Job("7", "CANCELLED", restarts=1, exit_code=3, nodes="gpu[3-4]")
    stub("scontrol", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(MachineError, match=r"SLURM does not answer: Unable to contact slurm controller"):
        find_job("7")


@pytest.mark.parametrize(
    ("slurm", "nodes", "message"),
    [
        ({"partition": "nosuch"}, 1, "slurm.partition 'nosuch' is not on this cluster: set slurm.partition to big or"),
        ({}, 3, r"--nodes 3 is more than partition big gives a job \(2\): use 2 or fewer"),
        ({"partition": "small"}, 4, r"--nodes 4 is more than partition small gives a job \(3\): use 3 or fewer"),
        ({"time": "2-00:00:00"}, 1, "slurm.time 2-00:00:00 is over the limit of partition big: use 1-00:00:00 or less"),
        ({"memory": "3T"}, 1, r"slurm.memory 3T is more than a node of partition big has \(2000000M\): use 2000000M"),
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
        (
            show(101, "PENDING", Reason="PartitionNodeLimit"),
            show(102, "PENDING", Reason="Dependency"),
            "train waits for 2 nodes with what its script asks for (PartitionNodeLimit): see sinfo",
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


RUNNING_101 = f"[[ $4 == 101 ]] && echo '{RUNNING.replace('JobId=7', 'JobId=101')}'"


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
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "report.json").touch()
    assert jobs.remaining(run_dir) == ("export",)
    (run_dir / "export" / "hf").mkdir(parents=True)
    assert jobs.remaining(run_dir) == ()
    os.utime(run_dir / "evaluation" / "report.json", (0, 0))
    assert jobs.remaining(run_dir) == ("evaluate", "export"), "an evaluation of an older checkpoint"


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
