"""One interface to train and score a decoder, with or without pipeline stages.

Without stages DeepSpeed's plain engine runs the whole list of layers (ZeRO 0 to 3); with stages its
pipeline engine runs each rank's part by 1F1B (ZeRO 1).
"""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Train
from parallel import zero
from parallel.axes import Groups
from parallel.layout import Layout
from parallel.libraries import deepspeed
from parallel.pipeline import StagedModule
from parallel.plan import LayerPlan
from parallel.shards import declared


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave: mean loss in nats and the gradient norm before clipping, over all ranks."""

    loss: float
    grad_norm: float


class Engine(Protocol):
    """A built decoder on this rank with its optimizer."""

    def train_step(self, micro_batches: Sequence[Tensor], *, learning_rate: float) -> StepOutcome:
        """Take one optimizer step on this data rank's micro-batches, each [micro_batch, seq + 1]."""
        ...

    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        """Return the mean loss over all data ranks, nothing learned; any length, the same on every rank."""
        ...

    def local_logits(self, tokens: Tensor) -> Tensor | None:
        """Return [batch, seq, local_vocab] of tokens [batch, seq] on the ranks of the last stage, None elsewhere."""
        ...

    def state(self) -> "State":
        """Return the door to weights and optimizer state."""
        ...


class State:
    """Weights and Adam's moments of this rank's part of the model, by logical name."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.parameters = declared(engine.module)

    def read(self, name: str, kind: zero.Kind) -> Tensor:
        """Return a tensor rank's slice, fp32; every data rank must call it alike."""
        return zero.read_state(self._engine, self.parameters[name][0], kind)

    def write(self, name: str, kind: zero.Kind, value: Tensor) -> None:
        """Set a tensor rank's slice."""
        zero.write_state(self._engine, self.parameters[name][0], kind, value)

    def set_step(self, step: int) -> None:
        """Set how many steps the optimizer has taken."""
        zero.set_optimizer_step(self._engine, step)


def make_engine(module: nn.Module, plan: LayerPlan, *, train: Train, layout: Layout, groups: Groups) -> Engine:
    """Return the engine of a module that holds its initial weights.

    Args:
        module: A `StagedModule` for pipeline > 1, else a module from tokens to local logits.
        plan: Where the loss comes from.
        train: Optimization.
        layout: How the ranks are cut.
        groups: Their process groups.
    """
    rounded = train.precision != "fp32"
    exact = {name: p.detach().clone() for name, (p, _) in declared(module).items()} if rounded else {}
    staged = isinstance(module, StagedModule)
    with redirect_stdout(StringIO()):  # DeepSpeed prints its settings
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=zero.adamw(module.parameters(), train=train),
            config=zero.deepspeed_config(train, layout=layout),
            mpu=None if staged else groups.grid,
            dist_init_required=False,
        )
    zero.start_optimizer(engine)
    made = _PipelineEngine(engine) if staged else _PlainEngine(engine, plan, groups=groups, clip=train.clip)
    state = made.state()
    for name, weight in exact.items():  # the fp32 weights must not be those that went through 16 bits
        state.write(name, "weight", weight)
    return made


class _PlainEngine:
    def __init__(self, engine: Any, plan: LayerPlan, *, groups: Groups, clip: float) -> None:
        self._engine, self._loss, self._data = engine, plan.loss, groups.data
        zero.report_norm_without_zero(engine, clip=clip)

    def train_step(self, micro_batches: Sequence[Tensor], *, learning_rate: float) -> StepOutcome:
        zero.set_learning_rate(self._engine, learning_rate)
        self._engine.train()
        total = torch.zeros((), device=self._engine.device)
        for batch in micro_batches:
            inputs, targets = split_batch(batch, device=self._engine.device)
            loss = self._loss(self._engine(inputs), targets)
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach()
        return StepOutcome(self._mean(total / len(micro_batches)), float(self._engine.get_global_grad_norm()))

    @torch.no_grad()
    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        self._engine.eval()
        batches = [split_batch(batch, device=self._engine.device) for batch in micro_batches]
        losses = [self._loss(self._engine(inputs), targets) for inputs, targets in batches]
        return self._mean(torch.stack(losses).mean())

    @torch.no_grad()
    def local_logits(self, tokens: Tensor) -> Tensor | None:
        self._engine.eval()
        logits: Tensor = self._engine(tokens.to(self._engine.device))
        return logits

    def state(self) -> State:
        return State(self._engine)

    def _mean(self, value: Tensor) -> float:
        dist.all_reduce(value, group=self._data.handle)
        return float(value) / self._data.size


class _PipelineEngine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._shape: tuple[int, ...] | None = None

    def train_step(self, micro_batches: Sequence[Tensor], *, learning_rate: float) -> StepOutcome:
        zero.set_learning_rate(self._engine, learning_rate)
        loss = self._engine.train_batch(self._batches(micro_batches))
        return StepOutcome(float(loss), float(self._engine.get_global_grad_norm()))

    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        loss = self._engine.eval_batch(self._batches(micro_batches), num_micro_batches=len(micro_batches))
        return float(loss)

    def local_logits(self, tokens: Tensor) -> Tensor | None:
        batch = torch.cat([tokens, tokens[:, :1]], dim=1)  # a target for each position; its loss is not asked for
        # The loss shifts logits in place, and DeepSpeed wants a scalar whatever is asked: give it another.
        module = self._engine.module
        with patch.object(module, "loss_fn", lambda logits, targets: logits.new_zeros(())):
            _, logits = self._engine.eval_batch(self._batches([batch]), return_logits=True, num_micro_batches=1)
        return logits  # type: ignore[no-any-return]

    def state(self) -> State:
        return State(self._engine)

    def _batches(self, micro_batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._shape != micro_batches[0].shape:
            # The engine keeps buffers of the last shape; without this the ranks abort at another length.
            self._engine.reset_activation_shape()
            self._shape = tuple(micro_batches[0].shape)
        return iter([split_batch(batch, device=self._engine.device) for batch in micro_batches])


def split_batch(batch: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [batch, seq] of a micro-batch [batch, seq + 1]."""
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
