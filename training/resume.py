"""Resume: load the newest checkpoint, and check that model and data have not changed."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import InputError
from configs.paths import run_folder
from configs.precisions import PRECISIONS
from configs.schema import RunConfig, Train
from configs.slow_parts import timed
from data_pipeline.loader import Loader
from parallel.axes import Group, Groups
from parallel.collectives import broadcast_from_first, wait_for_all
from parallel.engine import Engine
from training.checkpoint.manifest import list_checkpoints
from training.checkpoint.read import Checkpoint, load_slices, open_first_whole, open_on_all_ranks
from training.divergence import Diverged
from training.incarnation import Fence
from training.rollbacks import checkpoints_before, inherit_rollbacks, record_rollback
from training.schedule import learning_rate
from training.state import TrainState

logger = logging.getLogger(__name__)

# what a user may do if model or data have changed
_ACCEPT = "accept it with `trainshort train --accept-change`"
_WEIGHTS_ALONE = "take its weights alone with train.init_from"
CHECKED_SAMPLES = 4  # the run's first ones; every data rank scores them all, so that any layout gives the same loss


def has_checkpoint(config: RunConfig, *, world: Group) -> bool:
    """Return whether a run resumes, as rank 0 sees its folder. A collective: every rank calls it."""
    return broadcast_from_first(lambda: bool(list_checkpoints(run_folder(config))), group=world)


def resume(
    engine: Engine,
    loader: Loader,
    *,
    config: RunConfig,
    groups: Groups,
    fence: Fence,
    resumes: bool,
    accept_change: bool,
) -> TrainState:
    """Load the run's newest checkpoint into an engine or, at a first start, that of `train.branch_from`, if set.

    Or the weights of `train.init_from`. A collective: every rank calls it.

    Args:
        engine: Holds the run's initial weights, unless others are loaded.
        loader: The run's samples.
        config: The run.
        groups: This rank's places.
        fence: Shows whether this start of the run is still the newest.
        resumes: From `has_checkpoint`.
        accept_change: If model or data have changed, warn and continue.
    Returns:
        The position to train from.
    Raises:
        InputError: no checkpoint is whole, or something changed that was not accepted; raised on every rank.
    """
    run_dir, train = run_folder(config), config.train
    say = logger.info if groups.world.rank == 0 else logger.debug
    if resumes or train.branch_from is not None:
        path = run_dir if resumes else Path(str(train.branch_from))
        say("checking the %s", "newest checkpoint" if resumes else "checkpoint of train.branch_from")
        with timed("checked it", say=say):
            checkpoint = open_on_all_ranks(path, kinds=engine.state().kinds, world=groups.world)
        say("%s step %d, %s", "resuming from" if resumes else "branching off after", checkpoint.step, checkpoint.path)
        if not resumes:
            broadcast_from_first(lambda: inherit_rollbacks(train, fence=fence), group=groups.world)
            _say_rates(checkpoint, train=train, say=say)
        instead = None if accept_change else _ACCEPT if resumes else _WEIGHTS_ALONE
        return _continue(engine, loader, checkpoint, train=train, groups=groups, instead=instead)
    if train.init_from is not None:
        say("starting with the weights of train.init_from, %s", train.init_from)
        with timed("loaded them", say=say):
            source = open_on_all_ranks(Path(train.init_from), kinds=("weight",), world=groups.world)
            load_slices(engine.state(), source, kinds=("weight",), groups=groups)
    else:
        say("starting new: %s has no checkpoint", run_dir)
    return TrainState(0, 0)


def _say_rates(checkpoint: Checkpoint, *, train: Train, say: Callable[..., None]) -> None:
    """Say how the learning rate of a branch's first step differs from that of its trunk, if it does."""
    step = checkpoint.step + 1
    now, before = (learning_rate(step, train=each) for each in (train, checkpoint.config.train))
    if now != before:
        say("the learning rate of step %d is %.3g, in the run that it branches off from %.3g", step, now, before)


def go_back(
    engine: Engine,
    loader: Loader,
    diverged: Diverged,
    *,
    config: RunConfig,
    groups: Groups,
    fence: Fence,
    accept_change: bool,
) -> TrainState:
    """Load the newest checkpoint before a divergence and return its position; record which samples to leave out there.

    A collective: every rank calls it.

    Args:
        engine: Holds the state that diverged.
        loader: The run's samples.
        diverged: What was seen, the same on every rank.
        config: The run.
        groups: This rank's places.
        fence: Shows whether this start of the run is still the newest.
        accept_change: See `resume`.
    Raises:
        InputError: the run has gone back as often as it may, or no checkpoint is whole; raised on every rank.
        MachineError: a disk fails, or a newer start of the run has taken over; raised on every rank.
    """
    train, world = config.train, groups.world
    folders = broadcast_from_first(
        lambda: checkpoints_before(diverged, train=train, run_dir=fence.run_dir), group=world
    )
    try:
        checkpoint = open_first_whole(folders, kinds=engine.state().kinds, world=world)
        saved = (checkpoint.path, checkpoint.manifest)
        broadcast_from_first(lambda: record_rollback(diverged, *saved, train=train, fence=fence), group=world)
        instead = None if accept_change else "train in another run.dir"
        return _continue(engine, loader, checkpoint, train=train, groups=groups, instead=instead)
    except InputError as error:  # the same on every rank
        raise InputError(f"{diverged}, so training has diverged, and cannot go back: {error}") from None


def _continue(
    engine: Engine, loader: Loader, checkpoint: Checkpoint, *, train: Train, groups: Groups, instead: str | None
) -> TrainState:
    """Load all state of a checkpoint and return its position; every rank must call it.

    Args:
        engine: Holds other state.
        loader: The run's samples.
        checkpoint: A whole checkpoint.
        train: Section of the run.
        groups: This rank's places.
        instead: What a user may do if model or data have changed since it was saved; None to warn and continue.
    Raises:
        InputError: something changed that was not accepted; raised on every rank.
    """
    state, saved = engine.state(), checkpoint.manifest
    with timed("loaded it", say=logger.info if groups.world.rank == 0 else logger.debug):
        load_slices(state, checkpoint, kinds=state.kinds, groups=groups)
    state.set_step(checkpoint.step)
    changes = list(changes_since(engine, loader, checkpoint=checkpoint, train=train, world=groups.world))
    if changes and instead is not None:
        raise InputError(f"{changes[0]}, or {instead}")
    if groups.world.rank == 0:
        for change in changes:
            logger.warning("accepted: %s", change)
    return TrainState(
        saved.step, saved.consumed_samples, left_out_samples=saved.left_out_samples, loss_scale=saved.loss_scale
    )


def check_loss(engine: Engine, loader: Loader, world: Group) -> float:
    """Return the mean loss on the run's first samples, without training; every rank must call it."""
    samples = loader.first_samples(CHECKED_SAMPLES)
    wait_for_all(world)
    return engine.mean_loss(samples)


def changes_since(
    engine: Engine, loader: Loader, *, checkpoint: Checkpoint, train: Train, world: Group
) -> Iterator[str]:
    """Yield what has changed since a checkpoint was saved, the same on every rank; every rank must call it.

    Args:
        engine: The engine, with the checkpoint loaded.
        loader: The run's samples.
        checkpoint: The checkpoint.
        train: Section of the run; a branch may have another precision than its checkpoint.
        world: All ranks.
    """
    saved = checkpoint.manifest
    order = loader.order_hash(saved.next_sample)
    if order != saved.order_hash:
        yield (
            f"checkpoint {checkpoint.path} was saved before other samples than those that follow now (hash "
            f"{saved.order_hash[:12]}, now {order[:12]}): bring back the data that it was trained on"
        )
    loss, precisions = check_loss(engine, loader, world), (train.precision, checkpoint.config.train.precision)
    allowed = max(PRECISIONS[precision].resume_tolerance for precision in precisions)
    if not abs(loss - saved.probe_loss) <= allowed:  # true for nan too
        yield (
            f"checkpoint {checkpoint.path} gave the check batch a loss of {saved.probe_loss:.6f} when it was saved, "
            f"now {loss:.6f} (allowed: {allowed:g} more or less): the model computes another loss than then; "
            "use the version that saved it"
        )
