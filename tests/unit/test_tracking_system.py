"""What a node does during training reaches MLflow, and nothing of it reaches training."""

import logging
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest

from parallel.start import ProcessRank, node_count
from tests.support.mlflow_database import MlflowDatabase
from tests.support.run_folders import start_run
from training.tracking.spool import Event
from training.tracking.system import SystemMetrics, is_wanted, node_observers, wait_for_other_nodes
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


def listed(put: Callable[[Event], None], events: list[Event]) -> Callable[[Event], None]:
    """Return `put`, which also lists the events."""

    def listed_put(event: Event) -> None:
        events.append(event)
        put(event)

    return listed_put


def measure(run_dir: Path, *, samples: int) -> None:
    """Measure until some samples are spooled, however slow the machine is; `stop` adds one."""
    tracker = MlflowTracker(run_dir, name="first", experiment=None, uri=None)
    tracker.start({}, run_dir / "config.yaml")
    events: list[Event] = []
    system = SystemMetrics(listed(tracker.put, events))
    wait_for(lambda: system.measures.is_set() and len(events) >= samples)
    system.stop()
    tracker.finish("FINISHED")


def wait_for(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def test_samples_of_this_node_continue_over_starts(run_dir: Path, database: MlflowDatabase) -> None:
    measure(run_dir, samples=2)
    query = "select timestamp, step from metrics where key = 'system/cpu_utilization_percentage' order by timestamp"
    first = database.rows(query)
    assert len(first) >= 3
    names = {str(name) for (name,) in database.rows("select distinct key from metrics")}
    assert {f"system/{name}" for name in NAMES} <= names
    assert all(name.startswith("system/") for name in names)
    database.execute("update runs set start_time = start_time - 100000")
    measure(run_dir, samples=1)
    steps = [int(str(step)) for _, step in database.rows(query)]
    assert len(steps) > len(first)
    assert steps == sorted(steps)  # seconds since the run began
    assert steps[0] < 100 <= steps[-1]


def test_mlflows_variables_count(run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "rack 7")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1000")  # one line at the end
    measure(run_dir, samples=0)
    count = "select count(*) from metrics where key = 'system/rack 7/cpu_utilization_percentage'"
    assert database.rows(count) == [(1,)]
    for value in ("false", "False", "0"):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", value)
        events: list[Event] = []
        system = SystemMetrics(events.append)
        assert not system.measures.wait(0.5)
        system.stop()
        assert events == []
    assert is_wanted({})
    assert is_wanted({"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true"})


@pytest.mark.usefixtures("run_dir")
@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_a_variable_that_means_nothing_is_survived(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", value)
    events: list[Event] = []
    began = time.monotonic()
    system = SystemMetrics(events.append)
    wait_for(lambda: len(events) >= 2)
    system.stop()
    assert len(events) <= 1 + (time.monotonic() - began) / 0.3  # one per interval, and the last
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "inf")  # as if it were not set
    seen = len(events)
    system = SystemMetrics(events.append)
    wait_for(system.measures.is_set)
    system.stop()
    assert len(events) == seen + 1  # the last


def test_a_broken_monitor_is_left_out(
    run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)  # as in some containers
    measure(run_dir, samples=1)
    names = {str(name) for (name,) in database.rows("select distinct key from metrics")}
    assert {f"system/{name}" for name in NAMES} <= names
    monkeypatch.setattr("psutil.virtual_memory", lambda: None)  # fails at a sample
    tracker = MlflowTracker(run_dir, name="first", experiment=None, uri=None)
    tracker.start({}, run_dir / "config.yaml")
    system = SystemMetrics(tracker.put)
    wait_for(lambda: "system metrics" not in [thread.name for thread in threading.enumerate()])
    system.stop()
    tracker.finish("FINISHED")
    assert database.rows("select status from runs") == [("FINISHED",)]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_two_nodes_are_one_run_in_a_file(
    run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.tracking.system.CLOSING_SECONDS", 30.0)  # on a slow machine too
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    first_here, second_here = (ProcessRank(4 + local, 8, local, "env://", "torchrun") for local in (0, 1))
    assert node_observers(run_dir, process=second_here) == []
    assert node_observers(run_dir, process=ProcessRank(0, 8, 0, "env://", "torchrun")) == []
    nodes = ("near", "far")
    query = "select count(*) from metrics where key = 'system/{}/cpu_utilization_percentage'"
    for _ in range(2):  # a start and its resume
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "far")
        [observer] = node_observers(run_dir, process=first_here)
        wait_for(lambda: [*(run_dir / "tracking").glob("*.jsonl")])  # its first sample
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "near")
        tracker = MlflowTracker(run_dir, name="first", experiment=None, uri=None)
        tracker.start({}, run_dir / "config.yaml")
        events: list[Event] = []
        system = SystemMetrics(listed(tracker.put, events))
        for step in (1, 2, 3):
            tracker.metrics(step, {"train/loss": 1.0})
        wait_for(lambda events=events: events)
        system.stop()
        closing = Thread(target=observer.close, args=("FINISHED",))
        closing.start()  # later than this node, which waits for it
        wait_for_other_nodes(run_dir)
        tracker.finish("FINISHED")
        closing.join()
        assert not [*(run_dir / "tracking").glob("*.jsonl")], "all is sent"
    assert database.rows("select status from runs") == [("FINISHED",)]
    assert database.rows("select step from metrics where key = 'train/loss' order by step") == [(1,), (2,), (3,)]
    counts = [database.rows(query.format(node)) for node in nodes]
    assert all(int(str(count)) >= 4 for [(count,)] in counts), counts
    for node in nodes:
        names = {str(name) for (name,) in database.rows(f"select key from metrics where key like 'system/{node}/%'")}
        assert {f"system/{node}/{name}" for name in NAMES} <= names
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_node_that_is_lost_is_not_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.tracking.system.CLOSING_SECONDS", 1.0)
    start_run(run_dir)
    folder = run_dir / "tracking"
    folder.mkdir()
    # of an earlier start, and of a process that evaluates on a machine with that name
    for name in ("000000-1-elsewhere-node-abc", "000001-1-my-node-7-added-abc"):
        (folder / f"{name}-0000.jsonl").write_text('{"n": 1, "kind": "metrics"}\n')
    began = time.monotonic()
    wait_for_other_nodes(run_dir)
    assert time.monotonic() - began < 0.8
    (folder / "000001-2-elsewhere-node-abc-0000.jsonl").write_text('{"n": 1, "kind": "metrics"}\n')
    wait_for_other_nodes(run_dir)
    assert 1.0 <= time.monotonic() - began < 10.0


def test_energy_and_power_of_each_gpu_are_measured(
    run_dir: Path, database: MlflowDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing:
        """A counter of 36 kJ a sample."""

        def take(self) -> float:
            return 36_000.0

    monkeypatch.setattr("training.tracking.system.counters_of_node", lambda _: [Growing(), Growing()])
    measure(run_dir, samples=2)
    rows = database.rows("select value from metrics where key = 'system/gpu_1_energy_kwh' order by timestamp")
    energies = [float(str(value)) for (value,) in rows]
    assert energies == pytest.approx([0.01 * (2 + sample) for sample in range(len(energies))])
    assert len(energies) >= 3
    powers = database.rows("select value from metrics where key = 'system/gpu_0_mean_power_watts' order by timestamp")
    most = 36_000.0 / 0.3  # less where the machine is slow, and more only in the last sample
    assert all(0.05 * most < float(str(power)) <= 1.01 * most for (power,) in powers[:-1])


def test_a_wait_for_the_last_records_is_said_if_one_follows(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.tracking.tracker.SILENT_SECONDS", 0.2)
    caplog.set_level(logging.INFO)
    waiting, hung = threading.Event(), threading.Event()
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
