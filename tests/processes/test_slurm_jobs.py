"""Status, stop and resume of a chain, with stubs of SLURM's commands; tests/slurm has the real ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.paths import chain_file, slurm_stop_file
from launch.slurm.record import read_chain, refuse_active_jobs
from launch.slurm.status import chain_status, remaining_jobs
from tests.support.command_line import Call
from tests.support.slurm import RUNNING, show, stub_commands, submitted


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Create stubs of SLURM's commands, each from a line of bash."""
    return stub_commands(tmp_path / "bin", monkeypatch)


def test_a_second_chain_beside_an_active_one_is_refused(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{show(101, 'COMPLETED')}; {show(102, 'PENDING')}; {show(103, 'PENDING')}; true")
    with pytest.raises(InputError, match=r"has job 102 \(evaluate, PENDING\) already: wait for it, or end it with"):
        refuse_active_jobs(run_dir)
    refuse_active_jobs(tmp_path)


def test_status_shows_the_chain_and_says_what_to_do(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{RUNNING_101}; {show(102, 'PENDING', Reason='Dependency')}; {show(103, 'PENDING')}; true")
    metrics = run_dir / "metrics.jsonl"
    damaged = b'\x00\xff\n[]\n{"step": 5, "loss": \n{"step": 5, "lo'
    metrics.write_bytes(b'{"step": 3, "loss": 5.5}\n{"step": 4, "loss": 5.25}\n' + damaged)
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
    status = json.loads(trainshort("jobs", "status", str(run_dir), "--json").out)
    assert status["jobs"][0]["state"] == "STOPPED"
    assert (status["step"], status["loss"], status["steps"]) == (4, 5.25, 10)
    assert status["advice"] == f"stopped: trainshort jobs resume {run_dir} continues it"
    metrics.write_bytes(damaged)
    status = json.loads(trainshort("jobs", "status", str(run_dir), "--json").out)
    assert status["step"] is status["loss"] is None


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
            for reason in ("AssocGrpGRES", "QOSMaxJobsPerUserLimit")
        ),
        *(
            (
                show(101, "PENDING", Reason=reason),
                show(102, "PENDING", Reason="Dependency"),
                f"train will never start as it is ({reason}): trainshort jobs stop {{run_dir}}, change the slurm "
                "section, and submit again",
            )
            for reason in ("PartitionNodeLimit", "QOSMaxWallDurationPerJobLimit")
        ),
        (
            show(101, "PENDING", Reason="ReqNodeNotAvail,_UnavailableNodes:gpu2"),
            show(102, "PENDING", Reason="Dependency"),
            "train waits for 2 nodes with what its script asks for (ReqNodeNotAvail, UnavailableNodes:gpu2): see sinfo",
        ),
        (
            show(101, "FAILED", ExitCode="0:12"),
            show(102, "CANCELLED"),
            "stopped: trainshort jobs resume {run_dir} continues it",
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
    assert chain_status(run_dir).advice == (advice and advice.format(run_dir=run_dir))


def test_a_waiting_evaluation_names_its_own_nodes(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    run_values |= {"evaluate": {"tensor": 4, "pipeline": 3}, "slurm": {"gpus_per_node": 4}}
    run_dir = submitted(run_values, tmp_path)
    stub(
        "scontrol",
        f"{show(101, 'COMPLETED')}; {show(102, 'PENDING', Reason='ReqNodeNotAvail')}; {show(103, 'PENDING')}; true",
    )
    advice = "evaluate waits for 3 nodes with what its script asks for (ReqNodeNotAvail): see sinfo"
    assert chain_status(run_dir).advice == advice


RUNNING_101 = f"[[ $4 == 101 ]] && echo '{RUNNING.replace('JobId=7 JobName=a', 'JobId=101 JobName=small')}'"


@pytest.mark.parametrize(
    ("train", "calls"),
    [
        (show(101, "RUNNING"), ["103", "102", "--batch --signal=USR2 101"]),
        (show(101, "PENDING"), ["103", "102", "101"]),
        (show(101, "COMPLETED"), ["103", "102"]),
    ],
)
def test_stop_saves_a_running_training_and_cancels_the_rest(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call, train: str, calls: list[str]
) -> None:
    run_dir = submitted(run_values, tmp_path)
    stub("scontrol", f"{train}; {show(102, 'PENDING')}; {show(103, 'PENDING')}; true")
    stub("scancel", f'echo "$@" >>{tmp_path}/calls')
    answer = trainshort("jobs", "stop", str(run_dir))
    assert answer.code == 0
    assert (tmp_path / "calls").read_text().splitlines() == calls
    # If SLURM starts the training again meanwhile, that start reads this file.
    stop = slurm_stop_file(run_dir)
    assert (stop.read_text() if stop.exists() else None) == ("101\n" if "--batch" in calls[-1] else None)
    stub("scancel", 'echo "scancel: error: Kill job error on job id 103: Access/permission denied" >&2; exit 1')
    answer = trainshort("jobs", "stop", str(run_dir))
    assert answer.code == 3
    assert answer.error.startswith("error: job 103 (export) cannot be stopped: Kill job error on job id 103: Access/")


def test_only_jobs_with_work_left_remain(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    assert remaining_jobs(run_dir) == ("train", "evaluate", "export")
    last = run_dir / "checkpoints" / "step_0000010"
    last.mkdir(parents=True)
    assert remaining_jobs(run_dir) == ("evaluate", "export")
    report = write_report(run_dir)
    assert remaining_jobs(run_dir) == ("export",)
    (run_dir / "export" / "hf").mkdir(parents=True)
    assert remaining_jobs(run_dir) == ()
    os.utime(report, (0, 0))
    assert remaining_jobs(run_dir) == ("evaluate", "export"), "an evaluation of an older checkpoint"


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
def test_a_report_counts_if_it_has_all_the_run_measures(
    run_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], left: tuple[str, ...]
) -> None:
    run_values["evaluate"] = {"protocols": ["nonoverlapping", "sliding:16"]}
    run_dir = submitted(run_values, tmp_path)
    (run_dir / "checkpoints" / "step_0000010").mkdir(parents=True)
    (run_dir / "export" / "hf").mkdir(parents=True)
    report = write_report(run_dir, **changes)
    assert remaining_jobs(run_dir) == left
    named = report.parent / "step_0000010" / report.name
    named.parent.mkdir()
    report.rename(named)
    report.write_text('{"results": [')
    assert remaining_jobs(run_dir) == left, "the newest report may be of another checkpoint"
    kept = named.rename(named.with_name("held-out.json"))
    assert remaining_jobs(run_dir) == left
    document = json.loads(kept.read_text())
    kept.write_text(json.dumps({**document, "data": {"name": "book.txt"}, "text_path": "/texts/book.txt"}))
    assert remaining_jobs(run_dir) == ("evaluate", "export"), "it is of another text"
    kept.unlink()
    assert remaining_jobs(run_dir) == ("evaluate", "export")


def write_report(
    run_dir: Path,
    *,
    checkpoint: str = "/elsewhere/run/checkpoints/step_0000010",
    lengths: tuple[int, ...] = (32, 64, 128, 256),
    stride: int = 16,
) -> Path:
    """Write the parts of a report that `jobs` reads."""
    results = [
        {"length": length, "protocol": protocol, "stride": stride if protocol == "sliding" else length}
        for length in lengths
        for protocol in ("nonoverlapping", "sliding")
    ]
    report = run_dir / "evaluation" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"checkpoint": checkpoint, "results": results}))
    return report


def test_a_partial_resume_keeps_the_finished_jobs(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, trainshort: Call
) -> None:
    run_dir = submitted(run_values, tmp_path)
    (run_dir / "checkpoints" / "step_0000010").mkdir(parents=True)
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    log = run_dir / "logs" / "slurm-evaluate-102.log"
    assert chain_status(run_dir).advice == (
        f"SLURM has forgotten evaluate: read {log}, then trainshort jobs resume {run_dir}"
    )
    stub("sbatch", "[[ $2 == *-evaluate ]] && echo 112 || echo 113")
    answer = trainshort("jobs", "resume", str(run_dir))
    assert answer.out.splitlines()[:2] == ["submitted evaluate: job 112", "submitted export: job 113"]
    assert read_chain(run_dir).jobs == {"train": "101", "evaluate": "112", "export": "113"}
    write_report(run_dir)
    (run_dir / "export" / "hf").mkdir(parents=True)
    status = chain_status(run_dir)
    assert (list(status.jobs), status.advice) == (["train", "evaluate", "export"], None)
    (run_dir / "metrics.jsonl").write_text('{"step": 10, "loss": NaN}\n')
    document = json.loads(trainshort("jobs", "status", str(run_dir), "--json").out)
    assert (document["step"], document["loss"]) == (10, None)
    assert trainshort("jobs", "resume", str(run_dir)).out.endswith("nothing is left to do\n")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"run": "small", "jobs": ["101"], "nodes": 2, "submitted_at": "now"}', "jobs: Input should be an object"),
        ('{"jobs": {}, "nodes": 2, "submitted_at": "now"}', "no run"),
        ("{", "the file: Invalid JSON"),
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
