"""The whole chain on two nodes x two ranks, from the submission to the exported model."""

import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import STEPS, Submitted, slurm, submit
from tests.support.mlflow_database import MlflowDatabase
from tests.support.processes import trainshort, wait_until

pytestmark = pytest.mark.slurm


def test_one_command_ends_in_an_evaluated_and_exported_model(unbroken: Submitted) -> None:
    assert [line["step"] for line in unbroken.metrics()] == list(range(1, STEPS + 1))
    assert unbroken.metrics()[-1]["loss"] < unbroken.metrics()[0]["loss"] - 1
    report = json.loads((unbroken.folder / "evaluation" / "report.json").read_text())
    assert [result["length"] for result in report["results"]] == [128, 2048]
    assert report["command"].endswith("--tensor 2 --pipeline 2")
    assert unbroken.status()["jobs"][1]["nodes"] == "node[1-2]", "two ranks on each"
    assert (unbroken.folder / "export" / "hf" / "model.safetensors").is_file()
    assert "logits differ by" in unbroken.log("export")


def test_eight_ranks_of_two_nodes_are_one_mlflow_run(home: Path) -> None:
    # Enough steps for the second node to import mlflow: nothing waits for what is measured there.
    run = submit(home, "eight", "slurm.ranks_per_node=4", "train.steps=16", "evaluate.every=0")
    run.wait_for()
    slurm("scancel", run.job("evaluate"), run.job("export"))
    database = MlflowDatabase(run.folder.parent / "mlflow.db")
    ((run_id, status),) = database.rows("select run_uuid, status from runs where name = 'eight'")
    assert status == "FINISHED"
    losses = f"select step, value from metrics where key = 'train/loss' and run_uuid = '{run_id}' order by step"
    assert database.rows(losses) == [(line["step"], line["loss"]) for line in run.metrics()]
    assert len(run.metrics()) == 16
    names = database.rows(f"select distinct key from metrics where key like 'system/%' and run_uuid = '{run_id}'")
    assert {str(name).split("/")[1] for (name,) in names} == {"node1", "node2"}
    params = dict(database.rows(f"select key, value from params where run_uuid = '{run_id}'"))
    assert (params["world_size"], params["layout.data"]) == ("8", "2")


def test_ranks_of_two_nodes_are_one_mlflow_run(unbroken: Submitted) -> None:
    database = MlflowDatabase(unbroken.folder.parent / "mlflow.db")
    record = json.loads((unbroken.folder / "mlflow_run.json").read_text())
    run_id = record["run_id"]
    training = "select run_uuid, status from runs where name = 'unbroken'"
    assert database.rows(training) == [(run_id, "FINISHED")]
    losses = f"select step from metrics where key = 'train/loss' and run_uuid = '{run_id}' order by step"
    assert database.rows(losses) == [(step,) for step in range(1, STEPS + 1)]
    names = {str(name) for (name,) in database.rows(f"select distinct key from metrics where run_uuid = '{run_id}'")}
    assert {
        f"system/{node}/{name}"
        for node in ("node1", "node2")
        for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes")
    } <= names
    assert not [name for name in names if name.startswith("system/cpu")], "both have a name"
    # one rank of each node measures it: as many samples, give or take the last
    measured = f"select step from metrics where run_uuid = '{run_id}'"
    samples = [
        len(database.rows(f"{measured} and key = 'system/{node}/cpu_utilization_percentage'"))
        for node in ("node1", "node2")
    ]
    assert abs(samples[0] - samples[1]) <= 2
    assert not [*(unbroken.folder / "tracking").glob("*.jsonl")], "all is sent"
    contexts = database.rows("select distinct value from input_tags where name = 'mlflow.data.context' order by value")
    assert [str(value) for (value,) in contexts] == ["evaluation", "tokenizer", "training", "validation"]


def test_status_is_one_table_of_the_chain(unbroken: Submitted) -> None:
    status = unbroken.status()
    assert {job["name"]: job["state"] for job in status["jobs"]} == dict.fromkeys(
        ("train", "evaluate", "export"), "COMPLETED"
    )
    assert [job["job"] for job in status["jobs"]] == [unbroken.job(name) for name in ("train", "evaluate", "export")]
    assert status["jobs"][0]["nodes"] == "node[1-2]"
    assert (status["step"], status["steps"], status["loss"]) == (STEPS, STEPS, unbroken.metrics()[-1]["loss"])
    assert status["advice"] is None
    table = unbroken.jobs("status")
    assert "COMPLETED" in table
    assert f"{STEPS}/{STEPS}" in table


def test_each_rank_has_its_own_log(unbroken: Submitted) -> None:
    logs = unbroken.folder / "logs"
    jobs = {f"slurm-{name}-{unbroken.job(name)}.log" for name in ("train", "evaluate", "export")}
    assert {file.name for file in logs.iterdir()} == {*(f"rank_{rank}.log" for rank in range(4)), *jobs}
    assert f"step {STEPS}/{STEPS}" in (logs / "rank_0.log").read_text()
    first, last = unbroken.log().splitlines()
    assert first.endswith(f"start 0 from step 0 on node[1-2], job {unbroken.job()}")
    assert last.endswith(f"trained to the last step: runs/unbroken/checkpoints/step_{STEPS:07d}")


def test_code_and_configuration_are_frozen_in_the_run_folder(unbroken: Submitted) -> None:
    frozen = unbroken.folder / "slurm"
    config = yaml.safe_load((frozen / "config.yaml").read_text())
    assert config == yaml.safe_load((unbroken.folder / "config.yaml").read_text())
    assert config["train"]["decay_steps"] == STEPS
    environment = json.loads((unbroken.folder / "environment.json").read_text())
    assert environment["packages"] == json.loads((frozen / "code" / "versions.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    source = json.loads((frozen / "code" / "source.json").read_text())
    assert environment["code"] == source
    assert len(source["commit"]) == 40
    assert (frozen / "code" / "training" / "run.py").is_file()
    assert "trainshort train runs/unbroken/slurm/config.yaml &" in (frozen / "train.sbatch").read_text()


def test_a_finished_run_is_not_trained_again(unbroken: Submitted) -> None:
    before = unbroken.exact()
    lines = len((unbroken.folder / "logs" / "rank_0.log").read_text().splitlines())
    assert unbroken.jobs("resume") == "runs/unbroken is trained, evaluated and exported: nothing is left to do\n"
    assert unbroken.jobs("stop") == "runs/unbroken has no job that runs or waits\n"
    again = submit(unbroken.home, "unbroken")
    again.wait_for()
    assert "trained to the last step" in again.log()
    for name in ("evaluate", "export"):
        again.wait_for(name)
    assert "step_0000012 is exported already: runs/unbroken/export/hf" in again.log("export")
    assert again.exact() == before
    assert len((again.folder / "logs" / "rank_0.log").read_text().splitlines()) == lines


def test_two_jobs_share_a_node(home: Path) -> None:
    small = ("parallel.pipeline=1", "train.steps=4", "slurm.extra=[--nodelist=node1]", "evaluate.every=0")
    # Another process listens on the port that the first of them, the next job, would use.
    listen = (
        "import os, pathlib, socket, time; port = 12001 + int(os.environ['SLURM_JOB_ID']); "
        "listening = socket.create_server(('', port)); pathlib.Path('listening').touch(); time.sleep(600)"
    )
    wrap = shlex.join([sys.executable, "-c", listen])
    listener = slurm(
        *("sbatch", "--parsable", "--nodelist=node1", f"--chdir={home}", "--output=/dev/null", f"--wrap=exec {wrap}")
    )
    wait_until((home / "listening").exists, lambda: slurm("squeue"))
    runs = [submit(home, name, *small, nodes=1) for name in ("one", "two")]
    for run in runs:
        run.wait_for()
        assert run.field("NodeList") == "node1"
        run.jobs("stop")
    slurm("scancel", listener.strip())
    one, two = runs
    assert int(one.job()) == int(listener) + 1
    assert len(one.metrics()) == 4
    assert one.exact() == two.exact()


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        (
            "slurm.partition=nosuch",
            2,
            "slurm.partition 'nosuch' is not on this cluster: set slurm.partition to main or spot",
        ),
        (
            "slurm.memory=65G",
            2,
            "slurm.memory 65G is more than a node of partition main has (64000M): use 64000M or less",
        ),
        (
            "slurm.extra=[--mem=65000]",
            3,
            "sbatch refused runs/refused/slurm/train.sbatch: Memory specification can not be satisfied; Requested node "
            "configuration is not available: fix the slurm section and submit again",
        ),
        *(
            (
                f"slurm.time={written}",
                2,
                f'small.yaml: slurm.time must be hours:minutes:seconds in quotes, got {seen}: write "1:30:00" or '
                '"2-00:00:00" (SLURM takes a number alone for minutes, and YAML may make a number of 1:30:00)',
            )
            for written, seen in (("5400", "5400"), ("'90'", "90"))
        ),
        (
            "data.dir=elsewhere",
            2,
            "data is not prepared in elsewhere (relative to HOME): "
            "run `trainshort prepare small.yaml --set run.dir=runs/refused --set data.dir=elsewhere`",
        ),
    ],
)
def test_a_request_the_cluster_cannot_satisfy_is_one_line(home: Path, value: str, code: int, message: str) -> None:
    words = ("--set", "run.dir=runs/refused", "--set", value)
    done = trainshort(home, "slurm", "small.yaml", "--nodes", "2", "--submit", *words)
    expected = message.replace("HOME", str(home))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {expected}\n")
    assert slurm("squeue", "--noheader") == ""


def test_more_nodes_than_the_cluster_has_is_one_line(home: Path) -> None:
    done = trainshort(home, "slurm", "small.yaml", "--nodes", "4", "--submit", "--set", "train.global_batch=64")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --nodes 4 is more than partition main gives a job (3): use 3 or fewer\n"
