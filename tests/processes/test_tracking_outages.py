"""Outages of a real MLflow server: whatever happens to it, each step arrives once, and the status is true."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.paths import metrics_path, spool_folder
from tests.support.command_line import Call
from tests.support.mlflow_server import LoggedRun, MlflowServer, Mode, wait_for
from tests.support.one_rank import OneRank
from training.incarnation import begin_incarnation
from training.metrics_file import MetricsFile
from training.observers import Observer, StepResult
from training.tracking.observer import TrackingObserver
from training.tracking.record import read_record
from training.tracking.tracker import MlflowTracker, attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    # of the proxy's connections that hang
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
        patch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        server = MlflowServer(tmp_path_factory.mktemp("server"))
        server.start()
        server.wait()
        yield server
        server.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {heads: 4}\n")
    return folder


def tracker_of(run_dir: Path, server: MlflowServer, **more: Any) -> MlflowTracker:
    tracker = MlflowTracker(
        run_dir, name="first", experiment="outages", uri=server.uri, first_pause_seconds=0.1, **more
    )
    tracker.start({"heads": 4}, run_dir / "config.yaml", listed_tags=more.pop("listed", None))
    return tracker


def take_steps(tracker: MlflowTracker, first: int, last: int, *, run: int = 0) -> None:
    for step in range(first, last + 1):
        tracker.metrics(step, {"loss": float(100 * run + step), "rate": 0.5})


def spooled(run_dir: Path) -> list[Path]:
    return sorted(spool_folder(run_dir).glob("*.jsonl"))


def test_a_server_that_breaks_in_every_way_gets_each_step_once(
    server: MlflowServer, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracker_of(run_dir, server)
    put_seconds: list[float] = []
    modes: tuple[Mode, ...] = ("pass", "loses answers", "fails", "hangs", "pass")
    for number, mode in enumerate(modes):
        server.set_mode(mode)
        began, asked = time.perf_counter(), server.asked
        take_steps(tracker, 100 * number + 1, 100 * number + 100)
        put_seconds.append((time.perf_counter() - began) / 100)
        tracker.put({"kind": "tags", "tags": {"mode": mode}})  # wakes the sender
        wait_for(lambda asked=asked: server.asked > asked + 1)
        if mode == "loses answers":
            server.kill()
            server.start()  # answers again while the proxy fails and hangs
    server.wait()
    tracker.finish("FINISHED")
    seen = LoggedRun(server, run_dir)
    assert seen.steps("loss") == [(step, float(step)) for step in range(1, 501)]
    assert seen.steps("rate") == [(step, 0.5) for step in range(1, 501)]
    assert (seen.status, *seen.artifacts()) == ("FINISHED", "config.yaml")
    assert spooled(run_dir) == []
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert statistics.median(put_seconds) < 0.0005, "seconds per step that tracking takes of training"


def test_two_starts_without_a_server_are_sent_as_one_run(server: MlflowServer, run_dir: Path, trainshort: Call) -> None:
    """A job on nodes without a network is killed and queued again in another layout; its evaluation is offline too."""
    for run, (layout, host) in enumerate((("tensor 2", "node1"), ("tensor 1", "node2"))):
        begin_incarnation(run_dir)
        tracker = MlflowTracker(run_dir, name="first", experiment="outages", uri=server.uri, offline=True)
        assert tracker.summary == f"MLflow: offline, `trainshort track sync {run_dir}` sends what is recorded"
        tags = {"trainshort.layouts": layout, "trainshort.hosts": host}
        tracker.start({"heads": 4}, run_dir / "config.yaml", tags={"trainshort.starts": str(run + 1)}, listed_tags=tags)
        take_steps(tracker, *((1, 30), (21, 50))[run], run=run)
        tracker.finish("FINISHED") if run else tracker.close()
    evaluation = attach(run_dir, uri=server.uri, offline=True)
    assert evaluation is not None
    (run_dir / "report.json").write_text("{}")
    evaluation.artifact(run_dir / "report.json", folder="evaluation")
    (run_dir / "report.json").unlink()  # the copy counts
    evaluation.nested("evaluate", kind="evaluate", params={"a": 1}, points=[("perplexity", 7.0, 128)], began_ms=1000)
    evaluation.close()
    assert read_record(run_dir) is None
    server.set_mode("fails")
    answer = trainshort("track", "sync", str(run_dir))
    assert (answer.code, answer.out) == (3, "")
    assert "cannot take" in answer.error
    assert "records wait in the run folder; check that the server runs" in answer.error
    server.set_mode("pass")
    answer = trainshort("track", "sync", str(run_dir))
    seen = LoggedRun(server, run_dir)
    assert (answer.code, answer.error) == (0, "")
    assert answer.out == f"{run_dir}: sent 67 records; run {seen.id} of {server.uri} is FINISHED\n"
    assert seen.steps("loss") == [(step, step + 100.0 * (step > 30)) for step in range(1, 51)]
    assert seen.status == "FINISHED"
    assert json.loads(seen.tags["trainshort.layouts"]) == ["tensor 2", "tensor 1"]
    assert (seen.tags["trainshort.starts"], seen.tags["trainshort.hosts"]) == ("2", '["node1", "node2"]')
    assert seen.artifacts() == {"config.yaml": 18}
    assert seen.artifacts("evaluation") == {"evaluation/report.json": 2}
    [nested] = seen.nested()
    assert (nested.info.run_name, nested.info.status, nested.info.start_time) == ("evaluate", "FINISHED", 1000)
    assert (nested.data.params, nested.data.metrics) == ({"a": "1"}, {"perplexity": 7.0})
    assert [path.name for path in spool_folder(run_dir).rglob("*") if path.is_file()] == [".lock", "sent.json"]

    answer = trainshort("track", "sync", str(run_dir), str(run_dir), "--json")
    [again] = json.loads(answer.out)["runs"]
    assert (again["sent"], again["status"], again["is_open"]) == (0, "FINISHED", False)
    assert len(seen.steps("loss")) == 50


def test_files_wait_for_a_broken_store_of_artifacts_alone(
    server: MlflowServer, run_dir: Path, trainshort: Call, caplog: pytest.LogCaptureFixture
) -> None:
    kept = server.artifacts.with_name("kept")
    if server.artifacts.exists():
        server.artifacts.rename(kept)
    server.artifacts.write_text("a file in place of the folder: root may write to a read-only one")
    tracker = tracker_of(run_dir, server)
    take_steps(tracker, 1, 20)
    wait_for(lambda: "takes no files" in caplog.text)
    (run_dir / "config.yaml").write_text("replaced meanwhile\n")
    take_steps(tracker, 21, 40)
    tracker.finish("FINISHED")
    seen = LoggedRun(server, run_dir)
    assert (seen.status, len(seen.steps("loss"))) == ("FINISHED", 40)
    server.artifacts.unlink()
    if kept.exists():
        kept.rename(server.artifacts)
    assert seen.artifacts() == {}
    assert trainshort("track", "sync", str(run_dir)).code == 0
    assert seen.artifacts() == {"config.yaml": len("model: {heads: 4}\n")}
    assert (len(seen.steps("loss")), spooled(run_dir)) == (40, [])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from training.incarnation import begin_incarnation
from training.tracking.tracker import MlflowTracker
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
begin_incarnation(run_dir)
tracker = MlflowTracker(run_dir, name="first", experiment="outages", uri=uri, offline=len(sys.argv) > 3)
tracker.start({}, run_dir / "config.yaml")
for step in range(1, 1001):
    tracker.metrics(step, {"loss": float(step), "rate": 0.5})
if len(sys.argv) == 3:
    while not (run_dir / "mlflow_run.json").exists():
        time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("offline", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["sending", "offline"])
def test_a_run_killed_with_sigkill_loses_no_step(
    server: MlflowServer, run_dir: Path, trainshort: Call, offline: bool
) -> None:
    words = [str(run_dir), server.uri, *(["offline"] if offline else [])]
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, *words], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    before = time.time() - 60
    os.utime(run_dir / "incarnation", (before, before))
    for file in spooled(run_dir):
        os.utime(file, (before, before))
    assert trainshort("track", "sync", str(run_dir)).code == 0
    seen = LoggedRun(server, run_dir)
    assert seen.steps("loss") == [(step, float(step)) for step in range(1, 1001)]
    assert (seen.status, seen.run.info.end_time) == ("KILLED", int(1000 * before))
    assert spooled(run_dir) == []
    # killed after the last checkpoint, it has finished; silence on another machine tells less
    values = json.loads((run_dir / "incarnation").read_text())
    (run_dir / "incarnation").write_text(json.dumps({**values, "machine": "another", "host": "another"}))
    record = json.loads((run_dir / "mlflow_run.json").read_text())
    (run_dir / "mlflow_run.json").write_text(json.dumps({**record, "open": True}))
    assert "is KILLED\n  it trains, or it was killed" in trainshort("track", "sync", str(run_dir)).out
    os.utime(run_dir / "incarnation", (before - 900, before - 900))
    (run_dir / "config.yaml").write_text("run: {}\nmodel: {}\ntrain: {steps: 5}\n")
    checkpoint = run_dir / "checkpoints" / "step_0000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    os.utime(checkpoint, (before - 900, before - 900))
    assert "is FINISHED" in trainshort("track", "sync", str(run_dir)).out


class TimedTracking(TrackingObserver):
    """Measures what tracking takes of each step."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.seconds: list[float] = []

    def on_step(self, result: StepResult) -> None:
        began = time.perf_counter()
        super().on_step(result)
        self.seconds.append(time.perf_counter() - began)


class Breaks(Observer):
    """Breaks the server in the middle of a training."""

    def __init__(self, server: MlflowServer) -> None:
        self.server = server

    def on_step(self, result: StepResult) -> None:
        if result.step == 2:
            self.server.set_mode("fails")
        elif result.step == 4:
            self.server.set_mode("pass")


def test_training_goes_on_without_the_server(
    server: MlflowServer, rank: OneRank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real training: the server is away from its second step on, until the last."""
    run_dir = tmp_path / "runs" / "trained"
    config = rank.config(run_dir, "train.steps=4", "train.decay_steps=4", f"track.uri={server.uri}")
    trainer = rank.trainer(config)
    certificate = run_dir / "certificates.jsonl"
    certificate.write_text("{}\n")
    metrics = MetricsFile(run_dir, last_step=0)
    tracking = TimedTracking(config, run_dir=run_dir, certificate=certificate)
    trainer.run([metrics, tracking, Breaks(server)])
    seen = LoggedRun(server, run_dir)
    losses = [json.loads(line)["loss"] for line in metrics_path(run_dir).read_text().splitlines()]
    assert seen.steps("train/loss") == [(step, loss) for step, loss in enumerate(losses, start=1)]
    assert seen.status == "FINISHED"
    assert seen.tags["trainshort.starts"] == "1"
    assert {*seen.artifacts()} == {"config.yaml", "environment.json", "certificates.jsonl"}
    assert statistics.median(tracking.seconds) < 0.0005
