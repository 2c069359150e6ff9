"""The trainer: take optimizer steps until all are done or someone asks to stop."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from configs.errors import InputError
from configs.figures import counted
from configs.schema import RunConfig
from configs.slow_parts import timed
from configs.step_sizes import size_of
from data_pipeline.loader import Loader
from data_pipeline.reading_ahead import ReadStep, reading_ahead
from parallel.axes import Groups
from parallel.collectives import broadcast_from_first, wait_for_all
from parallel.engine import Engine
from parallel.seeds import seed_for
from training.checkpoint.manifest import list_checkpoints
from training.checkpoint.rank_part import SaveError, WeightsDiverged
from training.data import open_data
from training.divergence import Diverged, LossWatch
from training.incarnation import Fence, Superseded
from training.loss_scale import loss_scale
from training.model.attention import windows_of
from training.observers import Observer, Status, StepResult
from training.preflight import Ready
from training.resume import go_back, resume
from training.rollbacks import Rollback, inherited_and_own, losses_before, without_left_out
from training.saver import Saver
from training.saves import Saves
from training.schedule import learning_rate
from training.state import TrainState
from training.step_figures import FigureExchange, SentFigures, StepFigures
from training.stopping import StopRequest, must_stop, remove_stop_file
from training.utilization import Utilization, world_peak_flops
from training.validator import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LaunchedStep:
    after: TrainState
    learning_rate: float
    sent: SentFigures


@dataclass(frozen=True)
class TakenStep:
    """A step that is done: the state after it, its learning rate and its figures."""

    after: TrainState
    learning_rate: float
    figures: StepFigures


@dataclass(frozen=True)
class Trainer:
    """Everything that one rank needs to train a run from `start` on.

    Attributes:
        config: The run.
        engine: The model and its optimizer, holding the state of `start`.
        loader: The run's samples.
        groups: This rank's places.
        device: This rank's device.
        validator: Measures held-out samples.
        saver: Saves checkpoints.
        stop: Shows whether someone asked to stop.
        fence: Shows whether this start of the run is still the newest.
        start: Where training continues.
        utilization: How much of its ranks' peak a speed is.
        steps_ahead: Steps that are launched before the result of one is read: 1 on a GPU, so that its queue never runs
            empty. Before a validation or a save none is.
        go_back: After a divergence, loads the checkpoint before it and returns where training goes on; every rank must
            call it. Raises InputError if the run may not go back.
    """

    config: RunConfig
    engine: Engine
    loader: Loader
    groups: Groups
    device: torch.device
    validator: Validator
    saver: Saver
    stop: StopRequest
    fence: Fence
    start: TrainState
    utilization: Utilization
    steps_ahead: int
    go_back: Callable[[Diverged], TrainState]

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, which reports for all ranks."""
        return self.groups.world.rank == 0

    def run(self, observers: Sequence[Observer]) -> TrainState:
        """Train to the last step or until asked to stop, and return the last state, which is saved.

        If a checkpoint before the last cannot be saved, log an error and continue.

        Args:
            observers: Get each step's result and how training ended; most ranks have none.
        Raises:
            SaveError: the last state cannot be saved.
            Superseded: a newer start of the run has taken over.
            InputError: training has diverged, and may not go back any more; raised on every rank.
        """
        status: Status = "FAILED"
        try:
            end = self._train(observers)
            status = "FINISHED" if end.step >= self.config.train.steps else "KILLED"
            if self.is_first_rank:
                remove_stop_file(self.fence)
                if status == "KILLED":
                    # before the first step there is nothing to save
                    saved = ", saved" if list_checkpoints(self.fence.run_dir) else ""
                    logger.warning("stopped after step %d%s: start again to continue", end.step, saved)
            return end
        except (SaveError, InputError):
            if self.is_first_rank:
                remove_stop_file(self.fence)  # the run ends anyway: the next start must train
            raise
        except Superseded:
            status = "SUPERSEDED"
            raise
        finally:
            with ExitStack() as stack:  # close each, even if another one fails
                for observer in observers:
                    stack.callback(observer.close, status)

    def _train(self, observers: Sequence[Observer]) -> TrainState:
        world, start = self.groups.world, self.start
        saves = Saves(self.saver, observers, world=world, device=self.device, step=start.step)
        wait_for_all(world)  # the first rank has opened its observers' files
        while True:
            try:
                return self._train_from(start, observers, saves)
            except Diverged as error:
                diverged = error
            saves.end(goes_on=bool(self.config.train.rollbacks))  # one in the background: it is of an earlier step
            start = self.go_back(diverged)
            self.saver.went_back(start)
            saves.saved_step = start.step
            broadcast_from_first(partial(self._tell_of_rollback, observers, step=start.step), group=world)

    def _train_from(self, start: TrainState, observers: Sequence[Observer], saves: Saves) -> TrainState:
        """Train from a position on, whose state the engine holds; raise Diverged on every rank if that cannot go on."""
        state, train, world, run_dir = start, self.config.train, self.groups.world, self.fence.run_dir
        validation_loss: float | None = None
        inherited, own = broadcast_from_first(partial(inherited_and_own, run_dir), group=world)
        losses = broadcast_from_first(lambda: losses_before(start, run_dir=run_dir, train=train), group=world)
        watch = LossWatch(train, losses)
        with reading_ahead(self.loader, device=self.device) as read_step:
            for taken in self.steps(read_step, start=start, rollbacks=[*inherited, *own]):
                state = taken.after
                watch.check(state, loss=taken.figures.loss, grad_norm=taken.figures.grad_norm)
                validated = self._validate(state, observers)
                validation_loss = validated.get("validation_loss")
                # Report before saving: a resume drops the lines past its checkpoint, but cannot recover a lost one.
                self._report(
                    observers,
                    taken,
                    **validated,
                    save_seconds=saves.take_seconds(),
                    failed_saves=saves.failed or None,
                    rollbacks=sum(rollback.step < state.step for rollback in own) or None,
                )
                if not taken.figures.saving:
                    saves.end(goes_on=True, written=True)
                if self._saves_after(state):
                    goes_on = state.step < self.config.train.steps
                    saves.save(state, validation_loss=validation_loss, goes_on=goes_on)
        saves.end(goes_on=False)
        if state.step != saves.saved_step:
            try:
                saves.save_last(state, validation_loss=validation_loss)
            except WeightsDiverged as error:
                raise Diverged(str(error), began=state.step, state=state) from None
        return state

    def _tell_of_rollback(self, observers: Sequence[Observer], *, step: int) -> None:
        # Loading takes minutes: a start that was overtaken meanwhile must not touch the newer one's files.
        self.fence.check()
        for observer in observers:
            observer.on_rollback(step)

    @cached_property
    def _exchange(self) -> FigureExchange:
        return FigureExchange(
            groups=self.groups,
            device=self.device,
            stop=self.stop,
            fence=self.fence,
            windows=windows_of(self.engine.module),
            is_saving=lambda: self.saver.is_writing,
        )

    def steps(
        self, read_step: ReadStep, *, start: TrainState | None = None, rollbacks: Sequence[Rollback] = ()
    ) -> Iterator[TakenStep]:
        """Take steps to the last one or until asked to stop, and yield each, in order.

        When a step is yielded, `steps_ahead` more may be launched, but none if the run validates or saves after it: the
        engine then holds its state.

        Args:
            read_step: Reads the samples of a step.
            start: Where to begin, if not at the trainer's own `start`.
            rollbacks: Those of the run: which samples it leaves out.
        """
        steps, exchange = self.config.train.steps, self._exchange
        launched: deque[_LaunchedStep] = deque()
        state = start or self.start
        stops = state.step < steps and self._any_rank_asked()
        while launched or (state.step < steps and not stops):
            while state.step < steps and not stops and self._may_launch(after=launched):
                launched.append(self._launch(self._without_left_out(state, rollbacks), read_step, exchange))
                state = launched[-1].after
            step = launched.popleft()
            figures = exchange.read(step.sent)
            yield TakenStep(step.after, step.learning_rate, figures)
            stops = stops or must_stop(figures.verdict, fence=self.fence)
            # A rank alone needs no exchange. Of several, one may have been asked during the validation or the save.
            asks_again = self.groups.world.size == 1 or self._pauses_after(step.after)
            stops = stops or (asks_again and step.after.step < steps and self._any_rank_asked())

    def _may_launch(self, *, after: Sequence[_LaunchedStep]) -> bool:
        """Return whether to launch a step after those that were launched and not read."""
        return not after or (len(after) <= self.steps_ahead and not self._pauses_after(after[-1].after))

    def _pauses_after(self, state: TrainState) -> bool:
        return self._saves_after(state) or self.validator.is_due(state.step)

    def _saves_after(self, state: TrainState) -> bool:
        return state.step % self.config.checkpoint.every == 0 or state.step == self.config.train.steps

    def _any_rank_asked(self) -> bool:
        return self.stop.any_rank_asked(
            fence=self.fence, reads_folder=self.is_first_rank, world=self.groups.world, device=self.device
        )

    def _launch(self, state: TrainState, read_step: ReadStep, exchange: FigureExchange) -> _LaunchedStep:
        config, step, began = self.config, state.step + 1, exchange.begin()
        rate = learning_rate(step, train=config.train)
        # Seed each step, so that dropout needs no saved random state. Tensor ranks share the seed: they must drop the
        # same elements of the residual stream, unless each has a part of its own.
        split = [self.groups.tensor.rank] if config.parallel.sequence and self.groups.tensor.size > 1 else []
        place = (self.groups.data.rank, self.groups.pipeline.rank, *split)
        torch.manual_seed(seed_for(config.run.seed, "dropout", step, *place))
        scale = loss_scale(state, train=config.train)
        size, size_after = (size_of(each, config) for each in (step, step + 1))
        micro_batches = read_step(state.next_sample, size, size_after)
        outcome = self.engine.train_step(micro_batches, learning_rate=rate, loss_scale=scale)
        if outcome.loss_scale != scale and self.is_first_rank:
            logger.info("step %d: gradients overflowed, loss scale %d instead of %d", step, outcome.loss_scale, scale)
        consumed = state.consumed_samples + size.batch
        after = replace(state, step=step, consumed_samples=consumed, loss_scale=outcome.loss_scale)
        return _LaunchedStep(after, rate, exchange.send(outcome, began=began))

    def _without_left_out(self, state: TrainState, rollbacks: Sequence[Rollback]) -> TrainState:
        past = without_left_out(state, rollbacks)
        if past != state and self.is_first_rank:
            left_out = counted(past.left_out_samples - state.left_out_samples, "sample")
            logger.info("after step %d, %s are left out, as after the rollback to it", state.step, left_out)
        return past

    def _validate(self, state: TrainState, observers: Sequence[Observer]) -> dict[str, Any]:
        """Validate if that is due after this step, and return the fields of its result."""
        if not self.validator.is_due(state.step):
            return {}
        for observer in observers:
            observer.before_validation(state.step)
        began = time.perf_counter()
        measured = self.validator.measure()
        seconds = time.perf_counter() - began
        return {
            "validation_loss": measured.loss,
            "validation_by_length": measured.by_length,
            "validation_by_source": measured.by_source,
            "validation_seconds": seconds,
        }

    def _report(self, observers: Sequence[Observer], taken: TakenStep, **sparse: Any) -> None:
        """Report a step to the observers; `sparse` holds the fields that only some steps have."""
        if not observers or (self.is_first_rank and not self.fence.may_be_ours()):
            return  # a newer start writes the metrics now; all ranks end together after this step
        state, figures = taken.after, taken.figures
        size = size_of(state.step, self.config)
        tokens_per_second = size.batch * self.config.data.sequence_length / figures.seconds
        full, causal = self.utilization.of(tokens_per_second, length=size.length)
        result = StepResult(
            step=state.step,
            loss=figures.loss,
            learning_rate=taken.learning_rate,
            grad_norm=figures.grad_norm,
            tokens_seen=state.consumed_samples * self.config.data.sequence_length,
            consumed_samples=state.consumed_samples,
            step_seconds=figures.seconds,
            tokens_per_second=tokens_per_second,
            model_flops_utilization=full,
            model_flops_utilization_causal=causal,
            memory_gb=figures.memory_gb,
            attention_density=figures.attention_density,
            loss_scale=state.loss_scale,
            energy_joules=figures.energy_joules,
            **sparse,
        )
        for observer in observers:
            observer.on_step(result)


def build_trainer(
    ready: Ready,
    *,
    engine: Engine,
    groups: Groups,
    fence: Fence,
    device: torch.device,
    stop: StopRequest,
    resumes: bool,
    accept_change: bool = False,
) -> Trainer:
    """Return the trainer of a run on this rank, resumed from the newest checkpoint; every rank must call it.

    Args:
        ready: The run, checked.
        engine: From `build_engine`; with the run's initial weights, unless others are loaded.
        groups: This rank's places.
        fence: Shows whether this start of the run is still the newest.
        device: This rank's device.
        stop: Shows whether someone asked to stop.
        resumes: From `has_checkpoint`.
        accept_change: Resume even if model or data have changed.
    Raises:
        InputError: the data or a checkpoint does not fit the run; raised on every rank.
        MachineError: the index of samples cannot be written beside the data; raised on every rank.
    """
    config, prepared = ready.config, ready.prepared
    with timed("opened the data", say=logger.info if groups.world.rank == 0 else logger.debug):
        loader, held_out = open_data(config, prepared=prepared, groups=groups)
    same: dict[str, Any] = {"config": config, "groups": groups, "fence": fence, "accept_change": accept_change}
    start = resume(engine, loader, resumes=resumes, **same)
    return Trainer(
        config=config,
        engine=engine,
        loader=loader,
        groups=groups,
        device=device,
        validator=Validator(engine, held_out, config=config, data=groups.data),
        saver=Saver(engine, loader, config=config, prepared=prepared, groups=groups, fence=fence, start=start),
        stop=stop,
        fence=fence,
        start=start,
        utilization=Utilization(
            config.model, prepared.vocab_size, peak=world_peak_flops(device, precision=config.train.precision)
        ),
        steps_ahead=1 if device.type == "cuda" else 0,
        go_back=partial(go_back, engine, loader, **same),
    )
