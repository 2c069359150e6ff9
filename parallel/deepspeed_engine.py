"""Engines on top of DeepSpeed.

Without pipeline stages, DeepSpeed's plain engine runs all layers (ZeRO 0 to 3). With stages, its pipeline engine runs
each rank's layers by 1F1B (ZeRO 1).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.choices import OPTIMIZERS, OptimizerChoice
from configs.precisions import PRECISIONS
from configs.schema import Train
from configs.slow_parts import timed
from parallel import zero
from parallel.axes import Group, Groups
from parallel.documents import split_batch
from parallel.engine import Engine, State, StepOutcome
from parallel.gradients import add_from_now_on, add_no_more, adds_in_turn, patch_gradients, sum_tied_gradients
from parallel.layout import Layout, effective_zero
from parallel.libraries import BackwardPass, NoopTimer, ReduceTiedGrads, deepspeed, runtime_engine
from parallel.muon import Muon
from parallel.pipeline import StagedModule
from parallel.seeds import initial_range
from parallel.shards import declared
from parallel.whole_matrices import WholeMatrices

logger = logging.getLogger(__name__)


def layer_placer(
    *, train: Train, layout: Layout, groups: Groups, device: torch.device
) -> Callable[[nn.Module], nn.Module]:
    """Return a function that gives a new layer the memory that it will train in, so that a rank never holds more.

    Its parameters move to the device in the type of the forward pass, and at ZeRO 3 are partitioned at once. Their
    values are not set.
    """
    dtype = getattr(torch, PRECISIONS[train.precision].dtype)

    def place(layer: nn.Module) -> nn.Module:
        for parameter in layer.parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype, device=device)
        if layout.zero == 3:
            zero.partition_layer(layer, train=train, layout=layout, groups=groups)
        return layer

    return place


def make_engine(module: nn.Module, *, train: Train, layout: Layout, groups: Groups, seed: int | None) -> Engine:
    """Return the engine of a module.

    Args:
        module: A `StagedModule` for pipeline > 1, else a module from tokens to local logits, or from tokens and targets
            to the mean loss; its layers are placed by `layer_placer`.
        train: Optimization settings.
        layout: How the ranks are split into axes.
        groups: Their process groups.
        seed: Seed of the initial weights; None to leave them unset, because a checkpoint will be loaded.
    """
    row = OPTIMIZERS[train.optimizer]
    staged = isinstance(module, StagedModule)
    say = logger.info if groups.world.rank == 0 else logger.debug
    # DeepSpeed takes fp16 on the newest CPUs alone; the others compute it too.
    any_cpu = patch.object(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    # ZeRO works with any optimizer of ours, and it would warn of those that it has not tried.
    any_optimizer = patch.object(runtime_engine, "is_zero_supported_optimizer", lambda _: True)
    # and it prints its settings
    with timed("built the engine", say=say), any_cpu, any_optimizer, redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=row.load()(module.parameters(), train=train),
            config=zero.deepspeed_config(train, layout=layout),
            mpu=None if staged else groups.grid,
            dist_init_required=False,
        )
        zero.start_optimizer(engine, row=row)
        if PRECISIONS[train.precision].scales_loss:
            engine.optimizer._update_scale = lambda has_overflow: None  # it would say that the step is left out
        patch_gradients(engine, groups=groups, clip=train.clip, overlap=layout.overlap)
        _share_matrices(engine, train=train, layout=layout, groups=groups)
    state = ZeroState(engine, row=row)
    if seed is not None:
        with timed(f"drew {state.held_weights:,} initial weights", say=say):
            state.draw_weights(seed=seed, tensor=groups.tensor)
    if staged:
        return _PipelineEngine(engine, state, data=groups.data)
    return _PlainEngine(engine, state, data=groups.data)


def _share_matrices(engine: Any, *, train: Train, layout: Layout, groups: Groups) -> None:
    """Let Muon work on whole matrices: each rank of those that hold their parts on some."""
    optimizer = zero.base_optimizer(engine)
    if isinstance(optimizer, Muon):
        holders = groups.stage if effective_zero(train, layout=layout) else groups.tensor
        assert holders is not None, "the layout did not ask for the groups of the stages"
        parts = zero.parts_of_matrices(engine, data=groups.data)
        optimizer.on_whole_matrices = WholeMatrices(
            parts, tensor=groups.tensor.size, group=holders, device=engine.device
        )


class ZeroState:
    """`State` of a DeepSpeed engine: reads gather ZeRO's shards, writes split into them."""

    def __init__(self, engine: Any, *, row: OptimizerChoice) -> None:
        self._engine, self._row = engine, row
        self.parameters = declared(engine.module)
        self.kinds = row.state_kinds

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Return those of `kinds` that are kept of a parameter."""
        return self._row.kinds_of(is_matrix=self.parameters[name][1].is_matrix)

    def check(self) -> None:
        """Fail if the optimizer keeps other tensors than its row names."""
        zero.require_moments(self._engine, row=self._row)

    def read(self, name: str, kind: str) -> Tensor:
        """Return this tensor rank's slice, fp32. A collective: all data ranks call it in one order."""
        return zero.read_state(self._engine, self.parameters[name][0], kind)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set this tensor rank's slice; for a weight, also update the forward pass's copy."""
        zero.write_state(self._engine, self.parameters[name][0], kind, value)

    @property
    def held_weights(self) -> int:
        """Number of weights that this rank draws."""
        ranges = (zero.held_range(self._engine, parameter) for parameter, _ in self.parameters.values())
        return sum(stop - start for start, stop in ranges)

    def draw_weights(self, *, seed: int, tensor: Group) -> None:
        """Set the run's initial weights, in fp32 also where the forward pass rounds them."""
        for parameter, shard in self.parameters.values():
            start, stop = zero.held_range(self._engine, parameter)
            part = initial_range(shard, seed=seed, tensor=tensor, start=start, stop=stop, device=parameter.device)
            zero.write_held(self._engine, parameter, "weight", part)

    def set_step(self, step: int) -> None:
        """Set the optimizer's step count."""
        zero.set_optimizer_step(self._engine, step)


class _ZeroEngine:
    """What both engines share."""

    def __init__(self, engine: Any, state: ZeroState) -> None:
        self._engine, self._state = engine, state
        self.module: nn.Module = engine.module
        self._adds_in_turn = adds_in_turn(engine)

    def train_step(
        self, micro_batches: Sequence[Tensor], *, learning_rate: float, loss_scale: float | None = None
    ) -> StepOutcome:
        zero.set_learning_rate(self._engine, learning_rate)
        zero.set_micro_batches(self._engine, len(micro_batches))
        seed = torch.initial_seed()
        while True:
            if loss_scale is not None:
                self._engine.optimizer.override_loss_scale(loss_scale)
            loss = self._step(micro_batches)
            outcome = StepOutcome(loss, zero.gradient_norm(self._engine), loss_scale)
            if not getattr(self._engine.optimizer, "overflow", False):  # torch's own optimizers have none
                return outcome
            zero.drop_gradients(self._engine)  # all ranks have left the step out
            if loss_scale is None or loss_scale <= 1 or not self._is_finite_everywhere(loss):
                return outcome
            loss_scale /= 2
            torch.manual_seed(seed)

    def _is_finite_everywhere(self, loss: Tensor) -> bool:
        """Return whether no rank's forward pass overflowed, which no scale of the loss helps. A collective."""
        is_finite = loss.isfinite().float()
        dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        return bool(is_finite)

    def state(self) -> State:
        self._state.check()
        return self._state

    def _step(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """Take a step, and return the mean loss of this rank's micro-batches."""
        raise NotImplementedError


class _PlainEngine(_ZeroEngine):
    def __init__(self, engine: Any, state: ZeroState, *, data: Group) -> None:
        super().__init__(engine, state)
        self._data = data

    def _step(self, micro_batches: Sequence[Tensor]) -> Tensor:
        self._engine.train()
        losses = []
        for batch in micro_batches:
            inputs, targets, documents = split_batch(batch, device=self._engine.device)
            loss = self._engine(inputs, targets, documents=documents)
            self._engine.backward(loss)
            losses.append(loss.detach())
            if self._adds_in_turn and len(losses) < len(micro_batches):
                add_from_now_on(self._engine)
            self._engine.step()  # DeepSpeed steps the optimizer only at the last micro-batch
        if self._adds_in_turn:
            add_no_more(self._engine)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        self._engine.eval()
        batches = [split_batch(batch, device=self._engine.device) for batch in micro_batches]
        losses = [self._engine(inputs, targets, documents=documents) for inputs, targets, documents in batches]
        return self._mean(torch.stack(losses).mean())

    @torch.no_grad()
    def local_logits(self, tokens: Tensor) -> Tensor | None:
        self._engine.eval()
        logits: Tensor = self._engine(tokens.to(self._engine.device))
        return logits

    def _mean(self, value: Tensor) -> float:
        dist.all_reduce(value, group=self._data.handle)
        return float(value) / self._data.size


class _PipelineEngine(_ZeroEngine):
    def __init__(self, engine: Any, state: ZeroState, *, data: Group) -> None:
        super().__init__(engine, state)
        engine.timers = NoopTimer()  # DeepSpeed's own keep two CUDA events per step for ever
        engine._INSTRUCTION_MAP = {
            **engine._INSTRUCTION_MAP,
            ReduceTiedGrads: lambda engine: sum_tied_gradients(engine, data=data),
        }
        engine._aggregate_total_loss = self._loss  # DeepSpeed's own sends it to all ranks, in two collectives
        if self._adds_in_turn:
            engine._INSTRUCTION_MAP[BackwardPass] = _backward_and_add
        self._shape: tuple[int, ...] | None = None

    def _step(self, micro_batches: Sequence[Tensor]) -> Tensor:
        loss: Tensor = self._engine.train_batch(self._batches(micro_batches))
        if self._adds_in_turn:
            add_no_more(self._engine)
        return loss

    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        loss = self._engine.eval_batch(self._batches(micro_batches), num_micro_batches=len(micro_batches))
        return float(loss)

    def local_logits(self, tokens: Tensor) -> Tensor | None:
        batch = torch.cat([tokens, tokens[:, :1]], dim=1)  # any target will do: the loss is not used
        module: StagedModule = self._engine.module
        with patch.object(module, "loss_fn", lambda x, targets: x.new_zeros(())), torch.no_grad():
            _, x = self._engine.eval_batch(self._batches([batch]), return_logits=True, num_micro_batches=1)
            return None if x is None else module.logits(x)  # DeepSpeed takes the last layer's output for logits

    def _loss(self) -> Tensor:
        total = self._engine.total_loss  # of the last stage
        return torch.zeros((), device=self._engine.device) if total is None else total / self._engine.micro_batches

    def _batches(self, micro_batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._shape != micro_batches[0].shape:
            # The engine keeps communication buffers of the last shape: without a reset, the ranks would abort.
            self._engine.reset_activation_shape()
            self._shape = tuple(micro_batches[0].shape)
        batches = [split_batch(batch, device=self._engine.device) for batch in micro_batches]
        # Every stage reads all micro-batches, and computes them in their order.
        self._engine.module.documents = iter([documents for _, _, documents in batches])
        return iter([(inputs, targets) for inputs, targets, _ in batches])


def _backward_and_add(engine: Any, buffer_id: int) -> None:
    engine._exec_backward_pass(buffer_id)
    add_from_now_on(engine)
