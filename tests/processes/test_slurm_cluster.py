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


def test_a_forgotten_job_is_looked_up_in_the_accounting(stub: Any) -> None:
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert find_job("7", name="a-train") == Job("7", "UNKNOWN")
    rows = ("REQUEUED|0:0|gpu[1-2]|a-train", "CANCELLED by 0|3:15|gpu[3-4]|a-train", "RUNNING|0:0|gpu9|b|train")
    stub("sacct", "; ".join(f"echo '{row}'" for row in rows))
    seen = Job("7", "CANCELLED", restarts=1, exit_code=3, signal=15, nodes="gpu[3-4]")
    assert find_job("7", name="a-train") == seen
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
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=nodes)


def test_a_request_within_a_partitions_limits_passes(run_values: dict[str, Any], stub: Any) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    stub("sinfo", "echo 500000")
    for slurm in ({"memory": "400G"}, {"partition": "small", "time": "9-00:00:00"}, {"partition": "small,big"}):
        run_values["slurm"] = slurm
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=2)


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
    check_partition_limits(check_run(run_values, name="small").slurm, nodes=3)


def test_a_wrong_partition_of_the_environment_is_named(
    run_values: dict[str, Any], stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("scontrol", f"echo '{PARTITIONS}'")
    monkeypatch.setenv("SBATCH_PARTITION", "no")
    run_values["slurm"] = {"partition": "big"}
    with pytest.raises(InputError, match="SBATCH_PARTITION 'no' is not on this cluster: set SBATCH_PARTITION to big"):
        check_partition_limits(check_run(run_values, name="small").slurm, nodes=1)
