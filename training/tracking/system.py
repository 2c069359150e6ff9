"""What a node does during training: CPU, memory, disk, network and GPUs, measured by MLflow's own monitors.

MLflow's own thread asks the server at each sample, and ends at the first error. Here the samples pass through the spool
like all metrics: they wait while the server is away, and those of several nodes are sent by one process.
"""

import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from parallel.start import ProcessRank, environment, node_count
from training.energy import EnergyMonitor, counters_of_node, open_nvml
from training.incarnation import newest_incarnation
from training.observers import Observer, Status
from training.tracking.client import import_client
from training.tracking.spool import Event, SpoolWriter, is_closed, now_ms, spool_files

logger = logging.getLogger(__name__)

MONITORS = ("CPU", "Disk", "Network", "GPU")
SAMPLING_SECONDS = 10.0  # MLflow's default
_NODE = "node"  # role of the other nodes, in the names of their files
CLOSING_SECONDS, _CLOSING_POLL_SECONDS = 2.0, 0.05


class SystemMetrics:
    """Measure this node in a background thread until `stop`, and spool the samples.

    MLflow's variables count: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING (here true unless it says false), and
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING and
    MLFLOW_SYSTEM_METRICS_NODE_ID.
    """

    def __init__(self, put: Callable[[Event], None]) -> None:
        """Begin to measure; `put` spools an event."""
        self._put = put
        self._ended = threading.Event()
        self.measures = threading.Event()  # a monitor's first reading is behind it: `stop` takes a last sample
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        if is_wanted(environment()):
            self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop; a thread that still imports mlflow is left behind."""
        self._ended.set()
        if self.measures.is_set():
            self._thread.join(CLOSING_SECONDS)

    def _run(self) -> None:
        environ = environment()
        node = environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or node_name(environ)
        prefix = f"system/{node}/" if node else "system/"
        try:
            interval = _number(environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"), default=SAMPLING_SECONDS)
            samples = max(1, int(_number(environ.get("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING"), default=1)))
            monitors = _monitors()
            for monitor in monitors:
                monitor.collect_metrics()  # the load of a CPU is measured since the call before
                monitor.clear_metrics()
            self.measures.set()
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
                named = {f"{prefix}{name}": value for name, value in values.items()}
                self._put({"kind": "metrics", "time_ms": now_ms(), "step": None, "values": named})
        except Exception:  # noqa: BLE001  no error of a monitor may reach training
            logger.debug("the system metrics of this node end here", exc_info=True)


class NodeObserver(Observer):
    """Spools the system metrics of a node; the first rank sends them with its own. It connects to no store."""

    def __init__(self, run_dir: Path) -> None:
        self._writer = SpoolWriter(run_dir, role=_NODE, on_problem=lambda problem: logger.debug("MLflow %s", problem))
        self._metrics = SystemMetrics(self._writer.put)

    def close(self, status: Status) -> None:
        """Spool the last sample."""
        self._metrics.stop()
        self._writer.close()


def node_observers(run_dir: Path, *, process: ProcessRank) -> list[Observer]:
    """Return the observer of a rank that is the first one of its node; empty on other ranks and on the first node."""
    is_first_of_node = process.local_rank == 0 and process.rank > 0
    return [NodeObserver(run_dir)] if is_first_of_node and is_wanted(environment()) else []


def wait_for_other_nodes(run_dir: Path) -> None:
    """Wait until the other nodes of this start have spooled their last samples, for two seconds at most."""
    newest, until = newest_incarnation(run_dir), time.monotonic() + CLOSING_SECONDS
    prefix = f"{newest.number:06d}-" if newest else ""
    of_a_node = re.compile(rf"{prefix}.*-{_NODE}-[^-]+-\d+\.jsonl")
    others = [file for file in spool_files(run_dir) if of_a_node.fullmatch(file.name)]
    while time.monotonic() < until and any(file.exists() and not is_closed(file) for file in others):
        time.sleep(_CLOSING_POLL_SECONDS)


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether to log system metrics."""
    return environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower() not in ("false", "0")


def node_name(environ: Mapping[str, str]) -> str | None:
    """Return this node's part of the metrics' names: its host name if the job has several nodes."""
    return socket.gethostname() if node_count(environ) > 1 else None


def _monitors() -> list[Any]:
    """Return the monitors that work here: MLflow's, of GPUs only with pynvml, and one of energy."""
    counters = counters_of_node(open_nvml())
    monitors: list[Any] = [EnergyMonitor(counters)] if counters else []
    for kind in MONITORS:
        try:
            import_client()  # as the sender does: threads that enter mlflow by different modules break its import
            module = import_module(f"mlflow.system_metrics.metrics.{kind.lower()}_monitor")
            monitors.append(getattr(module, f"{kind}Monitor")())
        except Exception as error:  # noqa: BLE001  a package or a driver that is not there
            logger.debug("no system metrics of the %s: %s", kind, error)
    return monitors


def _number(text: str | None, *, default: float) -> float:
    """Return the number that a text holds, at least 0.1; the default for any other text, and for inf."""
    try:
        number = float(text or default)
    except ValueError:
        return default
    return max(number, 0.1) if math.isfinite(number) else default
