"""The loop: one optimizer step after the other, until the steps are done or someone asks to stop."""

import logging
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
from parallel.axes import Groups
from parallel.engine import Engine
from parallel.seeds import seed_for
from training.checkpoint.write import SaveError
from training.incarnation import Fence
from training.observers import Observer, StepResult
from training.schedule import learning_rate
from training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where training is: all that survives a restart beside weights and moments."""

    step: int
    consumed_samples: int


@dataclass(frozen=True)
class Loop:
    """What one rank needs to train.

    Attributes:
        validate: Mean loss on the held-out samples, over all ranks.
        save: Save a checkpoint at a position, with the validation loss measured there; every rank calls it.
        stop: Whether someone asked to end.
        fence: Whether this start of the run is still the newest.
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
    save: Callable[[TrainState, float | None], None]
    stop: StopRequest
    fence: Fence
    flops_per_token: float
    peak_flops: float | None

    def run(self, start: TrainState) -> TrainState:
        """Train from a position and return the last one; it is saved.

        A checkpoint on the way that cannot be saved costs nothing but itself.

        Raises:
            SaveError: the last position cannot be saved.
            Superseded: a newer start of the run has taken over.
            TrainshortError: the loss or the gradient norm is no longer a number.
        """
        train, checkpoint = self.config.train, self.config.checkpoint
        position, saved, ended_at = start, start, time.perf_counter()
        validation, failed = None, 0
        while position.step < train.steps and not self._must_stop():
            position, result = self._step(position)
            every = self.config.evaluate.every
            validation = self.validate() if every and (position.step % every == 0) else None
            now = time.perf_counter()
            result = replace(result, validation_loss=validation, failed_saves=failed or None)
            self._tell(result, seconds=now - ended_at)
            ended_at = now
            # After the step is told: a resume drops what was told past its checkpoint, but cannot make up a lost step.
            if position.step % checkpoint.every == 0 or position.step == train.steps:
                if self._try_to_save(position, validation):
                    saved = position
                else:
                    failed += 1
        if position != saved:
            self._save(position, validation)
        return position

    def _save(self, position: TrainState, validation: float | None) -> None:
        for observer in self.observers:
            observer.before_save()
        self.save(position, validation)

    def _must_stop(self) -> bool:
        return self.stop.agreed(fence=self.fence, looks=self.groups.world.rank == 0, device=self.device)

    def _try_to_save(self, position: TrainState, validation: float | None) -> bool:
        try:
            self._save(position, validation)
        except SaveError as error:
            if self.groups.world.rank == 0:
                logger.error("NOT SAVED: %s; training goes on, and the next checkpoint is tried as planned", error)
            return False
        return True

    def _step(self, position: TrainState) -> tuple[TrainState, StepResult]:
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
        return TrainState(step, samples), result

    def _tell(self, result: StepResult, *, seconds: float) -> None:
        if self.observers and not self.fence.may_be_ours():
            return  # the ranks end before the next step, together
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        speed = tokens / seconds
        used = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        result = replace(
            result,
            step_seconds=seconds,
            tokens_per_second=speed,
            model_flops_utilization=used,
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
