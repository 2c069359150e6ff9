"""One rank's training, in the order in which things are built. Read this first."""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from configs.parameters import parameter_count
from configs.schema import RunConfig
from data_pipeline.loader import Loader, held_out_batches
from data_pipeline.manifest import Prepared
from data_pipeline.samples import Samples, open_samples
from parallel.engine import Engine, make_engine
from parallel.groups import Groups, make_groups
from parallel.layout import Layout
from parallel.pipeline import StagedModule
from parallel.seeds import initial_weights
from parallel.start import Place, start, stop
from parallel.zero import KINDS
from training import folder
from training.checkpoint.manifest import list_checkpoints
from training.checkpoint.read import load_slices, open_checkpoint
from training.checkpoint.write import save_checkpoint
from training.loop import Loop, Position
from training.model.decoder import Decoder, plan_layers
from training.observers import MetricsFile, Observer, ProgressLine, Status
from training.preflight import Ready, make_ready
from training.stopping import StopRequest
from training.tracking.observer import TrackingObserver
from training.utilization import flops_per_token, peak_flops

logger = logging.getLogger(__name__)


def train(config: RunConfig, place: Place) -> None:
    """Train one rank of a run, from its newest checkpoint if it has one, to its last step or until asked to stop.

    Args:
        config: The run as its file and overrides say.
        place: This process among the ranks.
    Raises:
        InputError: the run folder, the data or a checkpoint does not fit the run.
    """
    stopping = StopRequest()
    stopping.listen()  # before the slow part: a signal during start-up must not kill
    ready = make_ready(config, world_size=place.size)
    device = start(place)
    _train(ready, device=device, stopping=stopping)
    stop()  # not after an error: the others may sit in a collective, and this rank must end for them to be ended


def _train(ready: Ready, *, device: torch.device, stopping: StopRequest) -> None:
    config, run_dir, layout, prepared = ready.config, ready.run_dir, ready.layout, ready.prepared
    groups = make_groups(layout)
    if groups.world.rank == 0:
        folder.record(config, run_dir=run_dir, layout=layout, device=device)
    loader = Loader(
        _open(config, prepared=prepared, groups=groups, held_out=False),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
    )
    engine = build_engine(config, layout=layout, groups=groups, vocab_size=prepared.vocab_size, device=device)
    position = _resume(engine, config=config, run_dir=run_dir, groups=groups)
    parameters = parameter_count(config.model, vocab_size=prepared.vocab_size)
    loop = Loop(
        config=config,
        engine=engine,
        loader=loader,
        groups=groups,
        device=device,
        observers=_observers(config, run_dir=run_dir, position=position) if groups.world.rank == 0 else (),
        validate=_validator(engine, config=config, prepared=prepared, groups=groups),
        save=_saver(engine, config=config, prepared=prepared, groups=groups),
        stop=stopping,
        flops_per_token=flops_per_token(config.model, parameters=parameters, length=config.data.sequence_length),
        peak_flops=_world_peak(config, device=device),
    )
    _run(loop, start=position)


def _validator(engine: Engine, *, config: RunConfig, prepared: Prepared, groups: Groups) -> Callable[[], float]:
    """Return what measures the mean loss on the held-out samples."""
    held_out = _open(config, prepared=prepared, groups=groups, held_out=True) if config.evaluate.every else None

    def validate() -> float:
        assert held_out is not None
        batches = held_out_batches(
            held_out,
            count=config.evaluate.samples,
            micro_batch=config.train.micro_batch,
            data_rank=groups.data.rank,
            data_size=groups.data.size,
        )
        return engine.mean_loss(list(batches))

    return validate


def _saver(engine: Engine, *, config: RunConfig, prepared: Prepared, groups: Groups) -> Callable[[Position], None]:
    """Return what saves a checkpoint at a position."""

    def save(position: Position) -> None:
        save_checkpoint(
            engine.state(),
            config=config,
            groups=groups,
            tokenizer=prepared.tokenizer,
            vocab_size=prepared.vocab_size,
            step=position.step,
            samples=position.consumed_samples,
        )

    return save


def _run(loop: Loop, *, start: Position) -> None:
    """Run the loop and tell the observers how it ended."""
    status: Status = "FAILED"
    try:
        end = loop.run(start)
        status = "FINISHED" if end.step >= loop.config.train.steps else "KILLED"
        if loop.observers and status == "KILLED":
            logger.warning("stopped after step %d, saved: start again to go on", end.step)
    finally:
        with ExitStack() as stack:  # each is closed, also when another one fails
            for observer in loop.observers:
                stack.callback(observer.close, status)


def _open(config: RunConfig, *, prepared: Prepared, groups: Groups, held_out: bool) -> Samples:
    """Open the samples on rank 0 first, which builds their index; the others then find it."""
    data = config.data

    def open_now() -> Samples:
        return open_samples(
            prepared, sequence_length=data.sequence_length, split=data.split, seed=config.run.seed, held_out=held_out
        )

    samples = open_now() if groups.world.rank == 0 else None
    dist.barrier()
    return samples or open_now()


def build_engine(config: RunConfig, *, layout: Layout, groups: Groups, vocab_size: int, device: torch.device) -> Engine:
    """Return the engine of a run on this rank, with the run's initial weights."""
    plan = plan_layers(config.model, vocab_size=vocab_size, tensor=groups.tensor, recompute=config.train.recompute)
    module: nn.Module = StagedModule(plan, groups=groups) if layout.pipeline > 1 else Decoder(plan)
    initial_weights(module, seed=config.run.seed, tensor=groups.tensor)
    return make_engine(module.to(device), plan, train=config.train, layout=layout, groups=groups)


def _resume(engine: Engine, *, config: RunConfig, run_dir: Path, groups: Groups) -> Position:
    """Load the newest checkpoint of the run folder, or else the weights that the run starts from."""
    state = engine.state()
    if list_checkpoints(run_dir):
        checkpoint = open_checkpoint(run_dir)
        load_slices(state, checkpoint, kinds=KINDS, tensor=groups.tensor)
        state.set_step(checkpoint.step)
        return Position(checkpoint.step, checkpoint.manifest.consumed_samples)
    if config.train.init_from is not None:
        source = open_checkpoint(Path(config.train.init_from))
        load_slices(state, source, kinds=("weight",), tensor=groups.tensor)
    return Position(0, 0)


def _observers(config: RunConfig, *, run_dir: Path, position: Position) -> list[Observer]:
    return [
        MetricsFile(run_dir, last_step=position.step),
        ProgressLine(first_step=position.step, steps=config.train.steps),
        TrackingObserver(config, run_dir=run_dir),
    ]


def _world_peak(config: RunConfig, *, device: torch.device) -> float | None:
    """Return the peak FLOP/s of all ranks together, or None where one is unknown."""
    dist.barrier()  # CPU ranks measure together, since they share cores
    mine = torch.tensor(peak_flops(device, precision=config.train.precision) or float("nan"), device=device)
    dist.all_reduce(mine)
    total = float(mine)
    return None if math.isnan(total) else total
