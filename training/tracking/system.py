"""What a node does during training: CPU, memory, disk, network and GPUs, measured by MLflow's own monitors.

MLflow's own thread asks the server at each sample, and ends at the first error. Here the samples pass through the
tracker like all metrics: they wait while the server is away.
"""

import logging
import math
import socket
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from parallel.start import ProcessRank, environment, node_count
from training.observers import Observer, Status
from training.tracking.record import read_record
from training.tracking.tracker import MlflowTracker, attach

logger = logging.getLogger(__name__)

MONITORS = ("CPU", "Disk", "Network", "GPU")
SAMPLING_SECONDS = 10.0  # MLflow's default
# how another node waits until the first one has opened the MLflow run
RECORD_POLL_SECONDS, RECORD_POLLS = 5.0, 360
_CLOSING_SECONDS = 2.0


class SystemMetrics:
    """Measure this node in a background thread until `stop`, and hand the samples to a tracker.

    MLflow's variables count: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING (here true unless it says false), and
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING and
    MLFLOW_SYSTEM_METRICS_NODE_ID.
    """

    def __init__(self, tracker: MlflowTracker) -> None:
        """Begin to measure."""
        self._tracker = tracker
        self._ended = threading.Event()
        self._measures = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        if is_wanted(environment()):
            self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop; a thread that still imports mlflow is left behind."""
        self._ended.set()
        if self._measures.is_set():
            self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        variables = environment()
        node = variables.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or node_name(variables)
        prefix = f"system/{node}/" if node else "system/"
        try:
            interval = _number(variables.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"), default=SAMPLING_SECONDS)
            samples = max(1, int(_number(variables.get("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING"), default=1)))
            monitors = _monitors()
            for monitor in monitors:
                monitor.collect_metrics()  # the load of a CPU is measured since the call before
                monitor.clear_metrics()
            self._measures.set()
            while monitors and not self._ended.is_set():
                for _ in range(samples):
                    is_last = self._ended.wait(interval)
                    for monitor in monitors:
                        monitor.collect_metrics()
                    if is_last:
                        break
                values: dict[str, float] = {}
                for monitor in monitors:
                    values |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
                self._tracker.metrics(None, {f"{prefix}{name}": value for name, value in values.items()})
        except Exception:  # noqa: BLE001  no error of a monitor may reach training
            logger.debug("the system metrics of this node end here", exc_info=True)


class NodeObserver(Observer):
    """Adds the system metrics of a node to the run that the first node logs; it says nothing if it cannot."""

    def __init__(self, run_dir: Path, *, uri: str | None) -> None:
        self._run_dir, self._uri = run_dir, uri
        self._ended = threading.Event()
        self._metrics: SystemMetrics | None = None
        self._tracker: MlflowTracker | None = None
        threading.Thread(target=self._follow, name="mlflow run", daemon=True).start()

    def close(self, status: Status) -> None:
        """Send the last sample; do not wait long for the server."""
        self._ended.set()
        if self._tracker is not None and self._metrics is not None:
            self._metrics.stop()
            self._tracker.close(wait_seconds=_CLOSING_SECONDS)

    def _follow(self) -> None:
        for _ in range(RECORD_POLLS):
            record = read_record(self._run_dir)
            if record is not None and record.is_open:
                # a sqlite file on a network disk does not survive that several nodes write to it
                is_server = record.uri is not None and not record.uri.startswith("sqlite")
                self._tracker = attach(self._run_dir, uri=self._uri, warns=False) if is_server else None
                self._metrics = SystemMetrics(self._tracker) if self._tracker else None
                return
            if self._ended.wait(RECORD_POLL_SECONDS):
                return


def node_observers(config: RunConfig, *, run_dir: Path, place: ProcessRank) -> list[Observer]:
    """Return the observer of a rank that is the first one of its node; empty on other ranks and on the first node."""
    is_first_of_node = place.local_rank == 0 and place.rank > 0
    return [NodeObserver(run_dir, uri=config.track.uri)] if is_first_of_node and is_wanted(environment()) else []


def is_wanted(variables: Mapping[str, str]) -> bool:
    """Return whether to log system metrics."""
    return variables.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower() not in ("false", "0")


def node_name(variables: Mapping[str, str]) -> str | None:
    """Return this node's part of the metrics' names: its host name if the job has several nodes."""
    return socket.gethostname() if node_count(variables) > 1 else None


def _monitors() -> list[Any]:
    """Return MLflow's monitors that work here; without psutil there is none, without pynvml none for GPUs."""
    monitors = []
    for kind in MONITORS:
        try:
            module = import_module(f"mlflow.system_metrics.metrics.{kind.lower()}_monitor")
            monitors.append(getattr(module, f"{kind}Monitor")())
        except Exception as error:  # noqa: BLE001  a package or a driver that is not there
            logger.debug("no system metrics of the %s: %s", kind, error)
    return monitors


def _number(text: str | None, *, default: float) -> float:
    """Return a number of 0.1 at least; the default for none, for what is no number, and for one without an end."""
    try:
        number = float(text or default)
    except ValueError:
        return default
    return max(number, 0.1) if math.isfinite(number) else default
