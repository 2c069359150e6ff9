"""A real job loses its MLflow server and its processes: MLflow has one run, each step once, and its true status."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.data import write_book
from tests.support.mlflow_server import LoggedRun, MlflowServer
from tests.support.processes import command, environment, metrics, run, trainshort, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

STEPS, EVERY, FEW = 300, 50, 60
ONE = ("parallel.tensor=1", "parallel.pipeline=1")
TWO = ("parallel.tensor=2", "parallel.pipeline=1")
VARIABLES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_book(folder)
    assert run(folder, "prepare", *sets("run", "http://127.0.0.1:9")).returncode == 0
    return folder


def sets(run_dir: str, uri: str, *, steps: int = STEPS) -> list[str]:
    saved = ("data.split=0.1", f"train.steps={steps}", f"checkpoint.every={EVERY}", "evaluate.every=0")
    return [*saved, f"run.dir={run_dir}", f"track.uri={uri}"]


def check_the_end(logged: LoggedRun) -> None:
    assert [step for step, _ in logged.steps("train/loss")] == [*range(1, STEPS + 1)]
    assert (logged.status, logged.tags["trainshort.starts"]) == ("FINISHED", "2")
    layouts = [layout.partition(", pipeline")[0] for layout in json.loads(logged.tags["trainshort.layouts"])]
    assert layouts == ["tensor 1", "tensor 2"]
    assert logged.run.data.params["parallel.tensor"] == "1"
    assert logged.tags["resumed.parallel.tensor"] == "2"
    assert {"config.yaml", "environment.json", "certificates.jsonl"} <= {*logged.artifacts()}
    [nested] = logged.nested()
    assert nested.info.status == "FINISHED"
    assert nested.data.params["lengths"] == "[16, 32]"
    lengths = [metric.step for metric in logged.client.get_metric_history(nested.info.run_id, "nonoverlapping/loss")]
    assert lengths == [16, 32]


@pytest.mark.faults
def test_a_killed_job_in_another_layout_is_one_mlflow_run(folder: Path, server: MlflowServer) -> None:
    run_dir = folder / "run"
    server.set_mode("hangs")
    with (folder / "train.log").open("w") as log:
        job = subprocess.Popen(
            command("train", *sets("run", server.uri), *ONE),
            cwd=folder,
            env=environment(**VARIABLES),
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def taken(step: int) -> None:
        wait_until(
            lambda: [line for line in metrics(run_dir) if line["step"] >= step] or job.poll() is not None,
            lambda: (folder / "train.log").read_text(),
            pause_seconds=0.005,
        )

    taken(EVERY + 3)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)
    killed_at = metrics(run_dir)[-1]["step"]
    assert killed_at < STEPS, "the kill came too late to test anything"
    server.set_mode("pass")
    synced = trainshort(folder, "track", "sync", "run", environment=environment(**VARIABLES))
    assert (synced.returncode, synced.stdout.split()[-1]) == (0, "KILLED"), synced.stderr
    steps = [step for step, _ in LoggedRun(server, run_dir).steps("train/loss")]
    assert steps == [*range(1, len(steps) + 1)]
    assert killed_at - 1 <= len(steps) <= killed_at, "the kill may come between the two files"

    server.set_mode("fails")
    again = run(folder, "train", *sets("run", server.uri), *TWO, **VARIABLES)
    assert again.returncode == 0, again.stderr
    assert "`trainshort track sync run` sends them" in again.stderr
    evaluated = trainshort(folder, "evaluate", "run", "--lengths", "16,32", environment=environment(**VARIABLES))
    assert evaluated.returncode == 0, evaluated.stderr
    server.set_mode("pass")
    synced = trainshort(folder, "track", "sync", "run", "--every", "1", environment=environment(**VARIABLES))
    assert (synced.returncode, synced.stdout.split()[-1]) == (0, "FINISHED"), synced.stderr
    check_the_end(LoggedRun(server, run_dir))


@pytest.mark.faults
def test_a_server_that_hangs_at_the_connection_costs_no_step(folder: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # the kernel drops what comes after them
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        began = time.monotonic()
        done = run(folder, "train", *sets("gone", f"http://127.0.0.1:{address[1]}", steps=FEW), *ONE, **VARIABLES)
        assert done.returncode == 0, done.stderr
        assert [line["step"] for line in metrics(folder / "gone")] == [*range(1, FEW + 1)]
        assert "cannot be reached" in done.stderr
        assert time.monotonic() - began < 120
        for each in waiting:
            each.close()
