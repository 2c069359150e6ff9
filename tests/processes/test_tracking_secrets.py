"""Passwords of the tracker never leave: a real run's folder, its MLflow store, its output and its jobs are searched."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import load_run
from launch.slurm.status import resume_chain
from launch.slurm.submit import submit_run
from parallel.layout import Layout
from parallel.start import ProcessRank
from tests.support.mlflow_database import MlflowDatabase
from tests.support.one_rank import OneRank
from tests.support.slurm import stub_commands
from training.metrics_file import MetricsFile
from training.observers import Observer
from training.reproduction.starts import record_start
from training.tracking.observer import TrackingObserver

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

SECRET = "hunter2"
SPELLINGS = ("hunter2", "hunt%65r2", "aHVudGVyMg")  # plain, percent-encoded, base64
LONG = "x" * 7000  # longer than a parameter may be
SECRETS = [
    f"slurm.env={{MLFLOW_TRACKING_PASSWORD: hunter2, MLFLOW_TRACKING_URI: 'https://me:hunter2@host', NOTES: {LONG}}}",
    "slurm.setup=['export HF_TOKEN=hunter2']",
]


def leaks(folder: Path) -> list[Path]:
    """Return the files that hold the secret in any spelling."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(text.encode() in path.read_bytes() for text in SPELLINGS)]


def train(rank: OneRank, run_dir: Path, *overrides: str) -> None:
    """Train with all observers that write, as a start of `trainshort train` does."""
    config = rank.config(run_dir, "train.steps=2", "train.decay_steps=4", *overrides)
    certificate = run_dir / "certificates.jsonl"
    trainer = rank.trainer(config)
    certificate.write_text("{}\n")
    typed = ["train", "my.yaml", "--set", "track.uri=https://me:hunter2@host"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["trainshort", *typed])
        process = ProcessRank(0, 1, 0, "", "local")
        layout = Layout.of(config, world_size=1)
        record_start(config, process, fence=trainer.fence, layout=layout, step=trainer.start.step, gpu=None, gpus=0)
    metrics = MetricsFile(run_dir, last_step=trainer.start.step)
    tracking = TrackingObserver(config, run_dir=run_dir, certificate=certificate)
    assert SECRET not in tracking.summary
    observers: list[Observer] = [metrics, tracking]
    trainer.run(observers)


def test_a_run_leaves_its_secrets_nowhere(
    rank: OneRank,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # outside a job the section slurm is not logged
    run_dir = tmp_path / "runs" / "stored"
    train(rank, run_dir, *SECRETS)
    database = MlflowDatabase(tmp_path / "runs" / "mlflow.db")
    assert database.rows("select status from runs") == [("FINISHED",)]
    assert ("***",) in database.rows("select value from params where key = 'slurm.env.MLFLOW_TRACKING_PASSWORD'")
    assert (run_dir / "checkpoints" / "step_0000002" / "config.yaml").is_file()
    artifacts = {path.name: path for path in (tmp_path / "runs" / "mlartifacts").rglob("*.json")}
    assert json.loads(artifacts["long_params.json"].read_text()) == {"slurm.env.NOTES": LONG}
    assert "--set track.uri=https://host" in json.loads(artifacts["reproduce.json"].read_text())["starts"][0]["command"]
    contexts = database.rows("select value from input_tags order by value")
    assert contexts == [("tokenizer",), ("training",)]

    # a server that cannot be reached: the password is in the library's own message
    for number, uri in enumerate(("http://me:hunt%65r2@127.0.0.1:9/m?api_key=hunter2", "http://me:hunter2/@h")):
        train(rank, tmp_path / "runs" / f"server-{number}", *SECRETS, f"track.uri={uri}")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "MLflow at http://127.0.0.1:9/m cannot be reached ([Errno 111] Connection refused)" in caplog.text
    assert any("MLflow at http://h refuses this run" in record.getMessage() for record in warnings)

    # a resume with another password is no change; it reads a run file without one
    assert load_run(str(run_dir / "config.yaml")).slurm.env["MLFLOW_TRACKING_PASSWORD"] == "***"
    train(rank, run_dir, *(text.replace(SECRET, "another") for text in SECRETS), "train.steps=3")

    assert leaks(tmp_path) == []
    output = capfd.readouterr()
    for text in (caplog.text, output.out, output.err):
        assert not any(spelling in text for spelling in SPELLINGS)


def test_jobs_get_secrets_from_the_environment_alone(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stub_commands(tmp_path / "bin", monkeypatch)
    stub("sbatch", f'env >>{tmp_path}/environment; n=$(grep -c ^HF_TOKEN {tmp_path}/environment); echo "$((100 + n))"')
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    run_dir = tmp_path / "run"
    overrides = ("slurm.ranks_per_node=1", "track.uri=https://me:hunter2@host", "slurm.env={HF_TOKEN: hunter2, A: 1}")
    submit_run(rank.config(run_dir, *overrides), nodes=1, folder=tmp_path)
    assert leaks(run_dir) == []

    def given() -> dict[str, Any]:
        lines = (tmp_path / "environment").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    assert (given()["HF_TOKEN"], given()["MLFLOW_TRACKING_URI"]) == ("hunter2", "https://me:hunter2@host")
    # submitted again from the frozen run file, which does not hold them
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        InputError, match=r"slurm.env.HF_TOKEN is a secret that .* does not hold: .*export HF_TOKEN="
    ) as e:
        resume_chain(run_dir)
    assert SECRET not in str(e.value)
    (tmp_path / "environment").unlink()
    monkeypatch.setenv("HF_TOKEN", "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:new@host")
    assert len(resume_chain(run_dir)) == 3
    assert (given()["HF_TOKEN"], given()["MLFLOW_TRACKING_URI"]) == ("other", "https://me:new@host")
    assert "hunter2" not in os.environ.values()
