"""A run whose progress tests log, without data or ranks."""

from pathlib import Path
from unittest.mock import Mock

from configs.load import load_run
from configs.schema import RunConfig
from parallel.layout import Layout
from training.preflight import Ready


def progress_run(*overrides: str) -> RunConfig:
    """Return the demo run of 1,024 tokens a step, with further overrides."""
    return load_run(
        "demo", overrides=["train.global_batch=16", "data.sequence_length=64", "train.warmup_steps=0", *overrides]
    )


def ready_to(run: RunConfig, *, world_size: int) -> Ready:
    """Return a run that starts new, as if its data were prepared."""
    prepared = Mock(vocab_size=600)
    return Ready(run, Path(run.run.dir), Layout.of(run, world_size=world_size), prepared, newest=None)
