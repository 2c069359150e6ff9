"""The observers of training: the interface, and the result of a step that they are given.

Rank 0 has those of the run, and the first rank of each other node may have one of the node. One that wants to end
training asks the run's `StopRequest`: all ranks then save and stop after the same step.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.terminal import Terminal
from training.further_losses import loss_at, loss_of

# MLflow's words for how a run ends; SUPERSEDED, a newer start has taken over, is ours
Status = Literal["FINISHED", "FAILED", "KILLED", "SUPERSEDED"]

LOOK_SECONDS = 0.1  # between two looks at work in the background, once training has ended


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; its fields are those of a line of metrics.jsonl, in this order.

    Attributes:
        step: Counted from 1 over all starts of the run.
        loss: Mean over the global batch, nats per token.
        grad_norm: Global, before clipping.
        tokens_seen: Since the first step of the run.
        consumed_samples: Since the first step of the run.
        step_seconds: Time of the step alone, without validation and saving.
        tokens_per_second: Over all ranks.
        model_flops_utilization: Fraction of all ranks' peak by the `full` convention, 6 N + 12 layers x hidden x length
            FLOPs a token; None if the peak is unknown.
        model_flops_utilization_causal: The same by the `causal` convention, with 6 instead of 12.
        memory_gb: Peak of the rank with the largest, in 1e9 bytes: resident set on a CPU, allocated on a GPU.
        attention_density: Mean share of the causal score blocks that attention computed, over all blocks, heads and
            micro-batches; None if no kernel counts them.
        validation_loss: Mean over the held-out samples; None in steps that did not measure it.
        validation_by_length: The mean at each further length, each a field of its own: `validation_loss_at_2048`.
        validation_by_source: The mean over each source's samples, likewise: `validation_loss_of_NAME`.
        validation_seconds: Time of these measurements.
        save_seconds: Time that training waited for the save that ended between the step before and this one; None if
            none did.
        failed_saves: Saves of this start that have failed so far; None if there are none.
        rollbacks: Times that training has gone back after a divergence, over all starts; None if it never has.
        loss_scale: Factor of the loss in fp16, with which no gradient overflowed; None in other precisions.
        energy_joules: Energy of all ranks' GPUs since the step before, from their drivers; None if one reports none.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_seen: int
    consumed_samples: int
    step_seconds: float
    tokens_per_second: float
    model_flops_utilization: float | None
    model_flops_utilization_causal: float | None
    memory_gb: float
    attention_density: float | None = None
    validation_loss: float | None = None
    validation_by_length: Mapping[int, float] = field(default_factory=dict)
    validation_by_source: Mapping[str, float] = field(default_factory=dict)
    validation_seconds: float | None = None
    save_seconds: float | None = None
    failed_saves: int | None = None
    rollbacks: int | None = None
    loss_scale: float | None = None
    energy_joules: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of a line, by name."""
        fields = asdict(self)
        by_length, by_source = fields.pop("validation_by_length"), fields.pop("validation_by_source")
        fields |= {loss_at(length): loss for length, loss in by_length.items()}
        return fields | {loss_of(source): loss for source, loss in by_source.items()}

    def values(self) -> dict[str, float]:
        """Return the fields that have a value, by name, without the step."""
        return {name: value for name, value in self.fields().items() if value is not None and name != "step"}


@dataclass(frozen=True)
class Save:
    """One checkpoint that was saved.

    Attributes:
        step: The step after which it was saved.
        folder: Its folder.
        seconds: Time from its begin to its end, in the background too.
    """

    step: int
    folder: Path
    seconds: float


class Observer:
    """Follows training on a rank; an observer overrides the methods that it needs."""

    def on_step(self, result: StepResult) -> None:
        """Take the result of a step."""

    def before_validation(self, step: int) -> None:
        """Learn that the step is done and a validation begins; `on_step` follows after it."""

    def before_save(self) -> None:
        """Make earlier results durable: a checkpoint is about to be saved, and a resume will not repeat its steps."""

    def checkpoints_in_use(self) -> Collection[Path]:
        """Return the checkpoints that the save to come must not remove: the observer reads them."""
        return ()

    def on_save(self, save: Save) -> None:
        """Learn that a checkpoint was saved."""

    def on_rollback(self, step: int) -> None:
        """Learn that training has diverged and goes on from this step, a checkpoint's: it takes later steps again."""

    def on_save_wait(self, seconds: float, *, goes_on: bool) -> None:
        """Learn for how long training has just waited for a save, and whether that goes on in the background."""

    def close(self, status: Status) -> None:
        """Release resources; training has ended with this status."""


class BackgroundObserver(Observer):
    """An observer with work of its own beside training, which it may have to finish when training has ended.

    Attributes:
        training_finished: Whether the last step was taken and saved.
    """

    training_finished = False

    def finish(self, *, asked: Callable[[], bool], terminal: Terminal) -> None:
        """Do what is left, once the last step is saved and the other ranks have ended.

        Args:
            asked: Returns whether to end instead, as before a job's time limit.
            terminal: Where to show what is waited for.
        """
