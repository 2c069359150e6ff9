"""One rank's training, in the order in which things are built. Read this first."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from configs.errors import InputError
from configs.parameters import parameter_count
from configs.paths import run_folder
from configs.schema import RunConfig
from data_pipeline.loader import Loader, held_out_batches
from data_pipeline.manifest import Prepared
from data_pipeline.samples import Samples, open_samples
from parallel.axes import Groups
from parallel.collectives import broadcast_from_first
from parallel.engine import Engine, make_engine
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.pipeline import StagedModule
from parallel.seeds import initial_weights
from parallel.start import ProcessRank, start, stop
from parallel.zero import KINDS
from training import folder
from training.checkpoint.manifest import SavedState, list_checkpoints
from training.checkpoint.read import load_slices, open_together
from training.checkpoint.write import SaveError, save_checkpoint
from training.continuity import changes_since, check_loss
from training.incarnation import Fence, Superseded
from training.loop import Loop, TrainState
from training.model.decoder import Decoder, plan_layers
from training.model.proof.attention_weights import DTYPES
from training.model.proof.certificate import Certificate, WrongPositions, certificates_to_json, certify
from training.observers import MetricsFile, Observer, ProgressLine, Status
from training.preflight import Ready, make_ready
from training.stopping import StopRequest, obey_stop_file
from training.tracking.observer import TrackingObserver
from training.utilization import flops_per_token, peak_flops

logger = logging.getLogger(__name__)


def train_rank(config: RunConfig, place: ProcessRank, *, accept_change: bool = False) -> None:
    """Train one rank of a run, from its newest checkpoint if it has one, to its last step or until asked to stop.

    Args:
        config: The run as its file and overrides say.
        place: This process among the ranks.
        accept_change: Go on from a checkpoint also where model or data are not what they were.
    Raises:
        InputError: the run folder, the data or a checkpoint does not fit the run.
        MachineError: the last state cannot be saved, or a newer start of the run has taken over.
    """
    stopping = StopRequest()
    stopping.listen()  # before the slow part: a signal during start-up must not kill
    ready = make_ready(config, world_size=place.world_size, device="cuda" if torch.cuda.is_available() else "cpu")
    device = start(place)
    _train(ready, device=device, stopping=stopping, accept_change=accept_change)
    stop()  # not after an error: the others may sit in a collective, and this rank must end for them to be ended


def _train(ready: Ready, *, device: torch.device, stopping: StopRequest, accept_change: bool) -> None:
    config, layout, prepared = ready.config, ready.layout, ready.prepared
    groups = make_groups(layout)
    fence = broadcast_from_first(
        lambda: folder.claim_run_folder(config, layout=layout, device=device), group=groups.world
    )
    loader = Loader(
        _open(config, prepared=prepared, groups=groups, held_out=False),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
    )
    with _refusal_recorded(ready, groups=groups):
        engine, certificates = build_engine(
            config, layout=layout, groups=groups, vocab_size=prepared.vocab_size, device=device
        )
    position = _resume(engine, loader, config=config, groups=groups, accept_change=accept_change)
    # Building takes minutes: a start that was overtaken meanwhile must not replace the newer one's metrics.
    broadcast_from_first(fence.check, group=groups.world)
    parameters = parameter_count(config.model, vocab_size=prepared.vocab_size)
    loop = Loop(
        config=config,
        engine=engine,
        loader=loader,
        groups=groups,
        device=device,
        observers=_observers(ready, position=position, certificates=certificates) if groups.world.rank == 0 else (),
        validate=_validator(engine, config=config, prepared=prepared, groups=groups),
        save=_saver(engine, loader, config=config, prepared=prepared, groups=groups, fence=fence, start=position),
        stop=stopping,
        fence=fence,
        flops_per_token=flops_per_token(config.model, parameters=parameters, length=config.data.sequence_length),
        peak_flops=_world_peak(config, device=device),
    )
    _run(loop, start=position)


@contextmanager
def _refusal_recorded(ready: Ready, *, groups: Groups) -> Iterator[None]:
    """Write certificates that are refused down beside the accepted ones: the next start may see other ones."""
    try:
        yield
    except WrongPositions as refused:
        if groups.world.rank == 0:
            text = {**certificates_to_json(refused.certificates, ready.config.model), "refused": str(refused)}
            step = 0 if ready.newest is None else ready.newest.step
            with folder.writing(ready.run_dir):
                folder.record_certificate(text, run_dir=ready.run_dir, step=step)
        raise


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


def _saver(
    engine: Engine,
    loader: Loader,
    *,
    config: RunConfig,
    prepared: Prepared,
    groups: Groups,
    fence: Fence,
    start: TrainState,
) -> Callable[[TrainState, float | None], None]:
    """Return what saves a checkpoint at a position."""
    # Newer than the one that was resumed: a resume has found them broken.
    broken = {found.path.absolute() for found in list_checkpoints(fence.run_dir) if found.step > start.step}

    def save(position: TrainState, validation: float | None) -> None:
        probe = check_loss(engine, loader)
        if not math.isfinite(probe):
            raise SaveError(
                f"step {position.step} was not saved (its loss on the probe batch is {probe}): its weights have "
                "diverged, go on from an earlier checkpoint with a lower train.learning_rate in another run.dir"
            )
        moment = SavedState(
            step=position.step,
            consumed_samples=position.consumed_samples,
            probe_loss=probe,
            order_hash=loader.order_hash(position.consumed_samples),
            # JSON has no nan: what was measured so is as good as not measured
            validation_loss=validation if validation is not None and math.isfinite(validation) else None,
        )
        saved = save_checkpoint(
            engine.state(),
            config=config,
            groups=groups,
            tokenizer=prepared.tokenizer,
            vocab_size=prepared.vocab_size,
            moment=moment,
            fence=fence,
            broken=broken,
        )
        broken.discard(saved.absolute())

    return save


def _run(loop: Loop, *, start: TrainState) -> None:
    """Run the loop and tell the observers how it ended."""
    status: Status = "FAILED"
    try:
        end = loop.run(start)
        status = "FINISHED" if end.step >= loop.config.train.steps else "KILLED"
        if loop.groups.world.rank == 0:
            obey_stop_file(loop.fence)
            if status == "KILLED":
                saved = ", saved" if end.step else ""  # before the first step there is nothing to save
                logger.warning("stopped after step %d%s: start again to go on", end.step, saved)
    except SaveError:
        if loop.groups.world.rank == 0:
            obey_stop_file(loop.fence)  # the run has ended all the same: the next start goes on
        raise
    except Superseded:
        status = "SUPERSEDED"
        raise
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


def build_engine(
    config: RunConfig, *, layout: Layout, groups: Groups, vocab_size: int, device: torch.device
) -> tuple[Engine, list[Certificate]]:
    """Return the engine of a run on this rank, with the run's initial weights, and all ranks' certificates.

    Raises:
        TrainshortError: a rank's positions are not what they must be; on every rank.
    """
    plan = plan_layers(config.model, vocab_size=vocab_size, tensor=groups.tensor, recompute=config.train.recompute)
    module: nn.Module = StagedModule(plan, groups=groups) if layout.pipeline > 1 else Decoder(plan)
    initial_weights(module, seed=config.run.seed, tensor=groups.tensor)
    module.to(device)
    dtype = DTYPES[config.train.precision]
    certificates = certify(module, config.model, groups=groups, dtype=dtype, device=device)
    return make_engine(module, plan, train=config.train, layout=layout, groups=groups), certificates


def _resume(engine: Engine, loader: Loader, *, config: RunConfig, groups: Groups, accept_change: bool) -> TrainState:
    """Load the newest checkpoint of the run folder, or else the weights that the run starts from."""
    state, run_dir = engine.state(), run_folder(config)
    if broadcast_from_first(lambda: bool(list_checkpoints(run_dir)), group=groups.world):
        checkpoint = open_together(run_dir, kinds=KINDS, world=groups.world)
        load_slices(state, checkpoint, kinds=KINDS, groups=groups)
        state.set_step(checkpoint.step)
        changes = list(changes_since(engine, loader, checkpoint=checkpoint, precision=config.train.precision))
        if changes and not accept_change:
            raise InputError(f"{changes[0]}, or accept it with `trainshort train --accept-change`")
        if groups.world.rank == 0:
            for change in changes:
                logger.warning("accepted: %s", change)
        return TrainState(checkpoint.step, checkpoint.manifest.consumed_samples)
    if config.train.init_from is not None:
        source = open_together(Path(config.train.init_from), kinds=("weight",), world=groups.world)
        load_slices(state, source, kinds=("weight",), groups=groups)
    return TrainState(0, 0)


def _observers(ready: Ready, *, position: TrainState, certificates: Sequence[Certificate]) -> list[Observer]:
    config, run_dir = ready.config, ready.run_dir
    with folder.writing(run_dir):
        text = certificates_to_json(certificates, config.model)
        certificate = folder.record_certificate(text, run_dir=run_dir, step=position.step)
        metrics = MetricsFile(run_dir, last_step=position.step)
    mine = certificates[0]
    return [
        metrics,
        ProgressLine(
            f"{ready.layout}; {mine.position} positions, attention {mine.backend} in {mine.precision} on {mine.device}",
            first_step=position.step,
            steps=config.train.steps,
        ),
        TrackingObserver(config, run_dir=run_dir, certificate=certificate),
    ]


def _world_peak(config: RunConfig, *, device: torch.device) -> float | None:
    """Return the peak FLOP/s of all ranks together, or None where one is unknown."""
    dist.barrier()  # CPU ranks measure together, since they share cores
    mine = torch.tensor(peak_flops(device, precision=config.train.precision) or float("nan"), device=device)
    dist.all_reduce(mine)
    total = float(mine)
    return None if math.isnan(total) else total
