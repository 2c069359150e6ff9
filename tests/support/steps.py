"""The result of a training step, defined once for the tests of observers."""

from dataclasses import replace
from typing import Any

from training.observers import StepResult

_RESULT = StepResult(
    step=1,
    loss=2.0,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens_seen=64,
    consumed_samples=4,
    step_seconds=0.1,
    tokens_per_second=640.0,
    model_flops_utilization=0.25,
    model_flops_utilization_causal=0.24,
    memory_gb=1.0,
)


def step_result(**fields: Any) -> StepResult:
    """Return the result of step 1, with some fields changed."""
    return replace(_RESULT, **fields)
