"""Read the states of jobs and the limits of partitions from SLURM's commands, which are stubs here."""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from configs.load import check_run
from launch.slurm.query import Job, check_partition_limits, find_job, parse_job
from tests.support.slurm import RUNNING, stub_commands

PARTITIONS = """\
PartitionName=big AllowGroups=ALL Default=YES MaxNodes=2 MaxTime=1-00:00:00 TotalNodes=8 State=UP
PartitionName=small AllowGroups=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED TotalNodes=3 State=UP
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Create stubs of SLURM's commands, each from a line of bash."""
    return stub_commands(tmp_path / "bin", monkeypatch)


def test_a_job_is_parsed_from_scontrols_line() -> None:
    assert parse_job(RUNNING) == Job("7", "RUNNING", restarts=2, nodes="gpu[1-4]", seconds_left=24 * 3600 - 630)
    killed = parse_job("JobId=9 JobState=FAILED Reason=JobLaunchFailure ExitCode=0:12")
    assert (killed.exit_code, killed.signal) == (0, 12)
    waiting = parse_job(
        "JobId=8 JobState=PENDING Reason=PartitionNodeLimit Restarts=0 ExitCode=0:0 RunTime=00:00:00 "
        "TimeLimit=UNLIMITED NodeList=(null)"
    )
    assert waiting == Job("8", "PENDING", "PartitionNodeLimit")
    assert not waiting.ended


@pytest.mark.parametrize(
    ("fields", "job"),
    [
        ("JobState=CANCELLED,COMPLETING ExitCode=0:9 NodeList=n1", Job("8", "CANCELLED", signal=9, nodes="n1")),
        ("JobState=RUNNING Restarts= ExitCode= RunTime=soon TimeLimit=Partition_Limit", Job("8", "RUNNING")),
        ("JobState=NODE_FAIL Restarts=x ExitCode=1 NodeList=(null)", Job("8", "NODE_FAIL", exit_code=1)),
        ("JobState=PENDING Restarts=7 Comment=of JobState=FAILED Restarts=9", Job("8", "PENDING", restarts=7)),
    ],
)
def test_fields_that_are_not_understood_end_no_command(fields: str, job: Job) -> None:
    assert parse_job(f"JobId=8 JobName=a {fields}") == job


def test_a_job_of_several_parts_is_the_first_of_them(stub: Any) -> None:
    parts = [RUNNING, RUNNING.replace("JobId=7", "JobId=8 ArrayJobId=7").replace("RUNNING", "FAILED")]
    lines = "; ".join(f"echo '{line}'" for line in ["of the site: mail=admin", *parts])
    stub("scontrol", f"printf 'caf\\xe9\\n'; {lines}")
    assert find_job("7", name="a-train") == parse_job(RUNNING)


def test_a_forgotten_job_is_looked_up_in_the_accounting(stub: Any) -> None:
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert find_job("7", name="a-train") == Job("7", "UNKNOWN")
    rows = ("REQUEUED|0:0|gpu[1-2]|a-train", "CANCELLED by 0|3:15|gpu[3-4]|a-train", "RUNNING|0:0|gpu9|b|train")
    stub("sacct", "; ".join(f"echo '{row}'" for row in rows))
    seen = Job("7", "CANCELLED", restarts=1, exit_code=3, signal=15, nodes="gpu[3-4]")
    assert find_job("7", name="a-train") == seen
    for row, job in {
        "NODE_FAIL|0:0|None assigned|a-train": Job("7", "NODE_FAIL"),
        "TIMEOUT|||a-train": Job("7", "TIMEOUT"),
        "OUT_OF_MEMORY|0:125|rack[1-2]-n[1-2]|a-train": Job("7", "OUT_OF_MEMORY", signal=125, nodes="rack[1-2]-n[1-2]"),
        "CANCELLED+|0:0|n1|a-train": Job("7", "CANCELLED", nodes="n1"),
        "RUNNING|0:0|n1|a-train": Job("7", "UNKNOWN", nodes="n1"),
        "|0:0|n1|a-train": Job("7", "UNKNOWN", nodes="n1"),
        "sacct: nothing|here": Job("7", "UNKNOWN"),
    }.items():
        stub("sacct", f"echo '{row}'")
        assert find_job("7", name="a-train") == job, row
    stub("scontrol", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(MachineError, match=r"SLURM does not answer: Unable to contact slurm controller"):
        find_job("7", name="a-train")


def test_a_job_with_our_id_and_another_name_is_not_ours(stub: Any) -> None:
    stub("scontrol", f"echo '{RUNNING}'")
    assert find_job("7", name="a-train").state == "RUNNING"
    assert find_job("7", name="b-train") == Job("7", "UNKNOWN"), "the controller counts from 1 again"


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
        ({"extra": ["--comment='with --nodes=2'"]}, 3, "--nodes 3 is more than partition big gives a job"),
        ({"partition": "small", "qos": "long"}, 4, r"--nodes 4 is more than partition small gives a job \(3\)"),
    ],
)
def test_a_request_over_a_partitions_limits_is_refused(
    run_values: dict[str, Any], stub: Any, slurm: dict[str, Any], nodes: int, message: str
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000; echo 2000000+")
    run_values["slurm"] = slurm
    with pytest.raises(InputError, match=message):
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=nodes, evaluation_nodes=1)


def test_an_evaluation_over_a_partitions_nodes_is_refused(run_values: dict[str, Any], stub: Any) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    with pytest.raises(
        InputError,
        match=r"^evaluate.tensor x evaluate.pipeline ranks need 3 nodes, more than partition big gives a job \(2\): "
        r"lower one of them$",
    ):
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=2, evaluation_nodes=3)


def test_a_request_within_a_partitions_limits_passes(run_values: dict[str, Any], stub: Any) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000")
    for slurm in ({"memory": "400G"}, {"partition": "small", "time": "9-00:00:00"}, {"partition": "small,big"}):
        run_values["slurm"] = slurm
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=2, evaluation_nodes=1)


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
        ({"extra": ['--partition="small"', "--mem=0", "--comment=it's"]}, {}),
        ({"extra": ["-p small # not --partition=big", "--mem=0"]}, {}),
    ],
)
def test_options_of_the_user_are_left_to_sbatch(
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
    # Over all limits of `big`: time, nodes, memory. `small` limits only its nodes and their memory.
    memory = {"memory": "501G"} if any("mem" in line for line in slurm.get("extra", [])) else {}
    run_values["slurm"] = {"time": "2-00:00:00", **memory, **slurm}
    check_partition_limits(check_run(run_values, name="small").slurm, nodes=3, evaluation_nodes=1)


def test_a_wrong_partition_of_the_environment_is_named(
    run_values: dict[str, Any], stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    monkeypatch.setenv("SBATCH_PARTITION", "no")
    run_values["slurm"] = {"partition": "big"}
    with pytest.raises(InputError, match="SBATCH_PARTITION 'no' is not on this cluster: set SBATCH_PARTITION to big"):
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=1, evaluation_nodes=1)
