"""Fixtures that several tests share."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C reach the processes that tests start: a shell makes what it runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_values(tmp_path: Any) -> dict[str, Any]:
    """Plain values of a valid small run whose folder is the test's own."""
    return {
        "run": {"name": "small", "dir": str(tmp_path / "run")},
        "model": {"layers": 4, "hidden": 64, "heads": 4},
        "data": {"sources": ["python-docs"], "vocab_size": 512, "sequence_length": 32},
        "parallel": {"tensor": 2, "pipeline": 2},
        "train": {"micro_batch": 2, "global_batch": 8, "steps": 10, "learning_rate": 0.001},
    }
