"""A run folder and data from version 0.1.0 can still be read, and training continues with the same losses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.load import load_run
from tests.support.one_rank import engine_of, one_thread
from training.checkpoint.verify import verify_checkpoints
from training.folder import claim_run_folder
from training.metrics_file import MetricsFile
from training.preflight import make_ready
from training.stopping import StopRequest
from training.trainer import build_trainer

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
EXACT = ("learning_rate", "tokens_seen", "consumed_samples")


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_resumes_with_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(OLD_RUN, run_dir)
    (run_dir / "data").rename(tmp_path / "data")
    monkeypatch.chdir(tmp_path)  # the run file has relative paths
    expected = metrics_of(run_dir)
    assert [step["step"] for step in expected] == [1, 2, 3, 4]
    (verdict,) = verify_checkpoints(run_dir)
    assert verdict.problems == ()
    ready = make_ready(load_run(str(run_dir / "config.yaml")), world_size=1, device="cpu")
    with one_thread():
        engine, groups = engine_of(ready.config, vocab_size=ready.prepared.vocab_size)
        trainer = build_trainer(
            ready,
            engine=engine,
            groups=groups,
            fence=claim_run_folder(ready.config, layout=ready.layout, device=torch.device("cpu")),
            device=torch.device("cpu"),
            stop=StopRequest(),
            resumes=True,
        )
        assert trainer.start.step == 2
        trainer.run([MetricsFile(run_dir, last_step=2)])
    steps = metrics_of(run_dir)
    assert steps[:2] == expected[:2]
    for step, old in zip(steps[2:], expected[2:], strict=True):
        assert [step[key] for key in EXACT] == [old[key] for key in EXACT]
        # The same bits on the processor that wrote it; another one may add in another order.
        assert step["loss"] == pytest.approx(old["loss"], abs=1e-6)
        assert step["grad_norm"] == pytest.approx(old["grad_norm"], abs=1e-6)
