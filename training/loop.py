"""The loop: one optimizer step after the other, until the steps are done or someone asks to stop."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from configs.errors import TrainshortError
from configs.schema import RunConfig
from data_pipeline.loader import Loader
from parallel.engine import Engine
from parallel.groups import Groups
from parallel.seeds import seed_for
from training.observers import Observer, StepResult
from training.schedule import learning_rate
from training.stopping import StopRequest


@dataclass(frozen=True)
class Position:
    """Where training is: all that survives a restart beside weights and moments."""

    step: int
    consumed_samples: int


@dataclass(frozen=True)
class Loop:
    """What one rank needs to train.

    Attributes:
        validate: Mean loss on the held-out samples, over all ranks.
        save: Save a checkpoint at a position; every rank calls it.
        stop: Whether someone asked to end.
        flops_per_token: Of forward and backward.
        peak_flops: Of all ranks together; None where unknown.
    """

    config: RunConfig
    engine: Engine
    loader: Loader
    groups: Groups
    device: torch.device
    observers: Sequence[Observer]
    validate: Callable[[], float]
    save: Callable[[Position], None]
    stop: StopRequest
    flops_per_token: float
    peak_flops: float | None

    def run(self, start: Position) -> Position:
        """Train from a position and return the last one; it is saved.

        Raises:
            TrainshortError: the loss or the gradient norm is no longer a number.
        """
        train, checkpoint = self.config.train, self.config.checkpoint
        position, saved, ended_at = start, start, time.perf_counter()
        while position.step < train.steps and not self.stop.agreed(device=self.device):
            position, result = self._step(position)
            every = self.config.evaluate.every
            validation = self.validate() if every and (position.step % every == 0) else None
            now = time.perf_counter()
            self._tell(result, seconds=now - ended_at, validation=validation)
            ended_at = now
            # After the step is told: a resume drops what was told past its checkpoint, but cannot make up a lost step.
            if position.step % checkpoint.every == 0 or position.step == train.steps:
                self.save(position)
                saved = position
        if position != saved:
            self.save(position)
        return position

    def _step(self, position: Position) -> tuple[Position, StepResult]:
        config, step = self.config, position.step + 1
        rate = learning_rate(step, train=config.train)
        # Seeded anew each step, so that dropout needs no saved random state. Tensor ranks share the seed:
        # they must drop the same elements of the residual stream.
        torch.manual_seed(seed_for(config.run.seed, "dropout", step, self.groups.data.rank, self.groups.pipeline.rank))
        outcome = self.engine.train_step(self.loader.step(position.consumed_samples), learning_rate=rate)
        if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            raise TrainshortError(
                f"the loss is {outcome.loss} and the gradient norm {outcome.grad_norm} at step {step}: nothing was "
                "saved since the last checkpoint; use a lower train.learning_rate or more warm-up in another run.dir"
            )
        samples = position.consumed_samples + config.train.global_batch
        result = StepResult(
            step=step,
            loss=outcome.loss,
            learning_rate=rate,
            grad_norm=outcome.grad_norm,
            tokens_seen=samples * config.data.sequence_length,
            consumed_samples=samples,
            step_seconds=0.0,
            tokens_per_second=0.0,
            model_flops_utilization=None,
            memory_gb=_largest(_peak_memory_gb(self.device), device=self.device),
        )
        return Position(step, samples), result

    def _tell(self, result: StepResult, *, seconds: float, validation: float | None) -> None:
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        speed = tokens / seconds
        used = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        result = replace(
            result,
            step_seconds=seconds,
            tokens_per_second=speed,
            model_flops_utilization=used,
            validation_loss=validation,
        )
        for observer in self.observers:
            observer.on_step(result)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _largest(value: float, *, device: torch.device) -> float:
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
