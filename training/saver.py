"""Saving during training: a checkpoint of the state after a step, checked before it is written."""

import logging
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from configs.schema import RunConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Prepared
from parallel.axes import Groups
from parallel.copies import equalize_copies
from parallel.engine import Engine
from training.checkpoint.manifest import CheckpointFolder, SavedState, list_checkpoints
from training.checkpoint.rank_part import BackgroundWriter, WeightsDiverged
from training.checkpoint.retention import apply_retention
from training.checkpoint.write import BegunSave, CheckpointWriter
from training.divergence import SPIKE_STEPS
from training.incarnation import Fence
from training.resume import check_loss
from training.state import TrainState

logger = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints of one start of a run.

    Args:
        engine: Holds the state.
        loader: The run's samples.
        config: The run.
        prepared: The run's data, whose tokenizer goes into each checkpoint.
        groups: This rank's places.
        fence: Shows whether this start of the run is still the newest.
        start: Where this start began to train.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        *,
        config: RunConfig,
        prepared: Prepared,
        groups: Groups,
        fence: Fence,
        start: TrainState,
    ) -> None:
        self._engine, self._loader, self._rules = engine, loader, config.checkpoint
        self._looks_for_spikes = config.train.spike is not None
        self._groups, self._fence = groups, fence
        self._writer = CheckpointWriter(config, groups, prepared.tokenizer, prepared.vocab_size, fence)
        self._background = BackgroundWriter() if config.checkpoint.background else None
        self._begun: BegunSave | None = None
        self.went_back(start)

    def went_back(self, start: TrainState) -> None:
        """Learn where training goes on: the resume skipped later checkpoints, so retention must not count them."""
        later = (saved.path.absolute() for saved in list_checkpoints(self._fence.run_dir) if saved.step > start.step)
        self._broken = {*later}

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a save in the background."""
        return self._begun is not None and not self._begun.is_written

    @property
    def begun_step(self) -> int | None:
        """The step whose save has begun and is not finished; None if there is none."""
        return None if self._begun is None else self._begun.saved.step

    def begin(self, state: TrainState, *, validation_loss: float | None, background: bool = False) -> bool:
        """Begin to save a checkpoint; every rank must call it, and `finish` before the next one.

        Args:
            state: The position of training.
            validation_loss: Measured after this step; None if it was not.
            background: Whether to return before this rank's files are written, if the run saves in the background.
        Returns:
            Whether it goes on in the background: training may continue, and `finish` waits for the files.
        Raises:
            WeightsDiverged: the loss on the check batch is not finite; raised on every rank.
            SaveError: the disk is full or failing; raised on every rank.
            Superseded: a newer start of the run has taken over; raised on every rank.
        """
        assert self._begun is None, "one save at a time"
        for difference in equalize_copies(self._engine.state(), groups=self._groups):
            if self._groups.world.rank == 0:
                logger.warning("step %d: the copies of %s differed: the first one was copied", state.step, difference)
        loss = check_loss(self._engine, self._loader, self._groups.world)
        if not math.isfinite(loss):
            raise WeightsDiverged(f"the loss on the check batch is {loss} after step {state.step}")
        saved = SavedState(
            step=state.step,
            consumed_samples=state.consumed_samples,
            left_out_samples=state.left_out_samples,
            loss_scale=state.loss_scale,
            probe_loss=loss,
            order_hash=self._loader.order_hash(state.next_sample),
            # JSON has no nan: record such a validation as not measured.
            validation_loss=validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None,
        )
        writer = self._background if background else None
        self._begun = self._writer.begin(self._engine.state(), saved, background=writer)
        return writer is not None

    def finish(self, *, in_use: Collection[Path] = ()) -> Path:
        """Wait until the save that has begun is written, and return its folder; every rank must call it.

        Args:
            in_use: Checkpoints that must not be removed now; those of rank 0 count.
        Raises:
            SaveError: a disk is full or failing; raised on every rank.
            Superseded: a newer start of the run has taken over; raised on every rank.
        """
        assert self._begun is not None, "no save has begun"
        begun, self._begun = self._begun, None
        folder = begun.finish(broken=self._broken, in_use={*in_use, *self._before_spike(begun.saved.step)})
        self._broken.discard(folder.absolute())
        return folder

    def _before_spike(self, step: int) -> list[Path]:
        """Return the checkpoints to keep so that one is from before a spike that has begun and is not noticed yet."""
        if not self._looks_for_spikes or self._groups.world.rank:
            return []
        whole: list[CheckpointFolder] = []
        with suppress(OSError):  # retention, which lists them too, warns
            listed = list_checkpoints(self._fence.run_dir)
            whole = [each for each in listed if each.path.absolute() not in self._broken]
        older = [each.path for each in whole if each.step <= step - SPIKE_STEPS]
        return [*older[-1:], *(each.path for each in whole[len(older) :])]

    def remove_old(self) -> None:
        """Remove, on rank 0, the checkpoints that no rule keeps and that the last save left as they were in use."""
        apply_retention(self._rules, fence=self._fence, broken=self._broken)
