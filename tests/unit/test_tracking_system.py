"""What a node does during training reaches MLflow, and nothing of it reaches training."""

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import pytest

from configs.load import load_run
from parallel.start import ProcessRank, node_count
from tests.support.mlflow_database import MlflowDatabase
from training.tracking.record import RunRecord, write_record
from training.tracking.system import SystemMetrics, is_wanted, node_observers
from training.tracking.tracker import MlflowTracker

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

NAMES = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.3")
    import_module("mlflow.system_metrics.system_metrics_monitor")  # takes seconds, in which nothing is measured
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


@pytest.fixture
def database(run_dir: Path) -> MlflowDatabase:
    return MlflowDatabase(run_dir.parent / "mlflow.db")


def measure(run_dir: Path, *, seconds: float) -> None:
    tracker = MlflowTracker(run_dir, name="first", experiment=None, uri=None)
    tracker.start({}, run_dir / "config.yaml")
    system = SystemMetrics(tracker)
    time.sleep(seconds)
    system.stop()
    tracker.finish("FINISHED")


def wait_for(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def test_samples_of_this_node_continue_over_starts(run_dir: Path, database: MlflowDatabase) -> None:
    measure(run_dir, seconds=1.0)
    query = "select timestamp, step from metrics where key = 'system/cpu_utilization_percentage' order by timestamp"
    first = database.rows(query)
    assert len(first) >= 2
    names = {str(name) for (name,) in database.rows("select distinct key from metrics")}
    assert {f"system/{name}" for name in NAMES} <= names
    assert all(name.startswith("system/") for name in names)
    database.execute("update runs set start_time = start_time - 100000")
    measure(run_dir, seconds=0.5)
    steps = [int(str(step)) for _, step in database.rows(query)]
    assert len(steps) > len(first)
    assert steps == sorted(steps)  # seconds since the run began
    assert steps[0] < 100 <= steps[-1]


def test_mlflows_variables_count(run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "rack 7")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1000")  # one line at the end
    measure(run_dir, seconds=0.7)
    count = "select count(*) from metrics where key = 'system/rack 7/cpu_utilization_percentage'"
    assert database.rows(count) == [(1,)]
    for value in ("false", "False", "0"):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", value)
        measure(run_dir, seconds=0.1)
    assert database.rows(count) == [(1,)]
    assert is_wanted({})
    assert is_wanted({"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true"})


class Recorder:
    """A tracker that counts what it gets."""

    def __init__(self) -> None:
        self.lines = 0

    def metrics(self, step: int | None, values: dict[str, float]) -> None:
        self.lines += 1


@pytest.mark.usefixtures("run_dir")
@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_a_variable_that_means_nothing_is_survived(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", value)
    tracker: Any = Recorder()
    system = SystemMetrics(tracker)
    wait_for(lambda: tracker.lines)
    time.sleep(0.3)
    system.stop()
    assert tracker.lines <= 4  # one per interval, and the last
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "inf")  # as if it were not set
    system = SystemMetrics(tracker)
    system.stop()
    assert tracker.lines <= 5


def test_a_broken_monitor_is_left_out(
    run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)  # as in some containers
    measure(run_dir, seconds=0.7)
    names = {str(name) for (name,) in database.rows("select distinct key from metrics")}
    assert {f"system/{name}" for name in NAMES} <= names
    monkeypatch.setattr("psutil.virtual_memory", lambda: None)  # fails at a sample
    measure(run_dir, seconds=0.3)
    assert database.rows("select status from runs") == [("FINISHED",)]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class Server(BaseHTTPRequestHandler):
    """An MLflow server that knows one run and keeps the metrics that it gets."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        info = {"run_id": "1", "run_uuid": "1", "status": "RUNNING", "lifecycle_stage": "active", "start_time": 0}
        self.answer({"run": {"info": info, "data": {}}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.extend(metric["key"] for metric in body.get("metrics", []))
        self.answer({})

    def answer(self, document: dict[str, Any]) -> None:
        text = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The address of an MLflow server."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_another_node_adds_to_the_same_run(
    run_dir: Path, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_run("demo", overrides=[f"run.dir={run_dir}", f"track.uri={server}"])
    monkeypatch.setattr("training.tracking.system.RECORD_POLL_SECONDS", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    first_here, second_here = (ProcessRank(4 + local, 8, local, "env://", "torchrun") for local in (0, 1))
    assert node_observers(config, run_dir=run_dir, place=second_here) == []
    [observer] = node_observers(config, run_dir=run_dir, place=first_here)
    write_record(run_dir, RunRecord("1", server))  # of an earlier start
    time.sleep(0.3)
    assert Server.seen == []
    write_record(run_dir, RunRecord("1", server, is_open=True))  # now the first node has opened it
    wait_for(lambda: Server.seen)
    observer.close("FINISHED")
    assert {f"system/{socket.gethostname()}/{name}" for name in NAMES} <= {*Server.seen}
    # a server that is away, and a file that several nodes must not write to
    for uri in ("http://127.0.0.1:9", "sqlite:////shared/mlflow.db"):
        write_record(run_dir, RunRecord("1", uri, is_open=True))
        [observer] = node_observers(config, run_dir=run_dir, place=first_here)
        time.sleep(0.3)
        observer.close("FAILED")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_wait_for_the_last_records_is_said_if_one_follows(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.tracking.tracker.SILENT_SECONDS", 0.2)
    caplog.set_level(logging.INFO)
    waiting, hung = Event(), Event()
    monkeypatch.setattr("training.tracking.sender.import_client", lambda: (waiting.set(), hung.wait(20)))
    for seconds, expected in ((0.1, 0), (0.5, 1)):
        tracker = MlflowTracker(run_dir, name="a", experiment=None, uri="http://127.0.0.1:9")
        tracker.start({}, run_dir / "config.yaml")
        assert waiting.wait(20)
        tracker.close(wait_seconds=seconds)
        assert caplog.text.count("sending the last records to MLflow, for at most 0.3 s more") == expected
    hung.set()


def test_nodes_are_counted_by_whoever_started_the_ranks() -> None:
    assert node_count({}) == 1
    assert node_count({"SLURM_STEP_NUM_NODES": "4"}) == 4
    assert node_count({"SLURM_STEP_NUM_NODES": "4", "TRAINSHORT_RANK": "0"}) == 1
    assert node_count({"SLURM_STEP_NUM_NODES": "4", "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}) == 2
