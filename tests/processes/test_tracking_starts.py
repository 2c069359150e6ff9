"""Runs that start at the same moment on a new store. Each is a process: MLflow guards itself only against threads."""

import subprocess
import sys
from pathlib import Path

from tests.support.mlflow_database import MlflowDatabase

RUNS = 8
# One process imports mlflow and forks the others, which then wait for the same file.
STARTS = """
import os, sys, time
from pathlib import Path
from training.tracking.tracker import MlflowTracker
from training.tracking.client import import_client
import_client()
folder, runs = Path(sys.argv[1]), int(sys.argv[2])
for number in range(runs):
    if os.fork() == 0:
        run_dir = folder / f"run {number}"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("a: 1")
        tracker = MlflowTracker(run_dir, name=run_dir.name, experiment="sweep", uri=None)
        while not (folder / "go").exists():
            time.sleep(0.001)
        tracker.start({"number": number}, run_dir / "config.yaml")
        tracker.metrics(1, {"loss": float(number)})
        tracker.finish("FINISHED", wait_seconds=280)
        os._exit(0)
(folder / "go").touch()
for _ in range(runs):
    os.wait()
"""


def test_a_sweep_started_at_once_on_nothing_loses_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", STARTS, str(tmp_path), str(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert "MLflow at" not in done.stderr, done.stderr
    database = MlflowDatabase(tmp_path / "mlflow.db")
    assert sorted(database.rows("select name, status from runs")) == [
        (f"run {number}", "FINISHED") for number in range(RUNS)
    ]
    assert sorted(database.rows("select value from metrics")) == [(float(number),) for number in range(RUNS)]
    assert database.rows("select name from experiments order by experiment_id") == [("Default",), ("sweep",)]
    assert len(list((tmp_path / "mlartifacts").rglob("config.yaml"))) == RUNS


# The monitors' thread has begun to import mlflow when the sender's does, as on a busy machine.
TWO_IMPORTS = """
import sys, time
from training.tracking.client import import_client, set_mlflow_defaults
from training.tracking.system import SystemMetrics
set_mlflow_defaults()
metrics = SystemMetrics(lambda event: None)
while "mlflow" not in sys.modules:
    time.sleep(0.001)
import_client()
while not metrics.measures.is_set():
    time.sleep(0.01)
print(*sorted(name for name in sys.modules if name.endswith("_monitor")))
"""


def test_monitors_do_not_break_the_senders_import() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", TWO_IMPORTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {f"mlflow.system_metrics.metrics.{kind}_monitor" for kind in ("cpu", "disk", "network")} <= set(
        done.stdout.split()
    )
