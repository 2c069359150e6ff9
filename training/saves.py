"""The saves of one start: when each begins and ends, what the observers learn, and how long training waited."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from parallel.axes import Group
from parallel.collectives import wait_for_all
from training.checkpoint.rank_part import SaveError
from training.observers import Observer, Save
from training.saver import Saver
from training.state import TrainState

logger = logging.getLogger(__name__)


class Saves:
    """Begins saves and ends them; every rank must make the same calls.

    Args:
        saver: Saves checkpoints.
        observers: Learn of each save.
        world: All ranks.
        device: This rank's device.
        step: The step that this start continues from.

    Attributes:
        saved_step: The newest step that is saved; `step` until this start has saved one.
        failed: Saves of this start that have failed so far.
    """

    def __init__(
        self, saver: Saver, observers: Sequence[Observer], *, world: Group, device: torch.device, step: int
    ) -> None:
        self.saved_step, self.failed = step, 0
        self._saver, self._observers, self._world, self._device = saver, observers, world, device
        self._began_at = 0.0
        self._waited = 0.0  # for the save that has begun, in seconds
        self._reported: float | None = None  # for those that have ended since `take_seconds`

    def save(self, state: TrainState, *, validation_loss: float | None, goes_on: bool) -> None:
        """Save a state, or log an error and let training continue.

        Args:
            state: The position of training.
            validation_loss: Measured after this step; None if it was not.
            goes_on: Whether training goes on, so that a run that saves in the background has a use for it.
        """
        self.end(goes_on=goes_on)
        with self._errors_logged(goes_on=goes_on), self._timed():
            self._begin(state, validation_loss=validation_loss, background=goes_on)

    def save_last(self, state: TrainState, *, validation_loss: float | None) -> None:
        """Save the last state.

        Raises:
            SaveError: it cannot be saved.
        """
        with self._timed():
            self._begin(state, validation_loss=validation_loss, background=False)

    def end(self, *, goes_on: bool, written: bool = False) -> None:
        """End the save that goes on in the background, if one does; log an error if it has failed.

        Args:
            goes_on: Whether training goes on.
            written: Whether all ranks have written: there is nothing to wait for.
        """
        step = self._saver.begun_step
        if step is None:
            return
        if not written and self._world.rank == 0:
            logger.info("waiting for the checkpoint of step %d, which is still being written", step)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step that is in its queue: its time is not the save's
        with self._errors_logged(goes_on=goes_on), self._timed():
            self._finish(step)

    def take_seconds(self) -> float | None:
        """Return how long training waited for the saves that ended since the last call; None if none did."""
        seconds, self._reported = self._reported, None
        return seconds

    def _begin(self, state: TrainState, *, validation_loss: float | None, background: bool) -> None:
        for observer in self._observers:
            observer.before_save()
        wait_for_all(self._world)  # the first rank's observers write to a disk
        self._began_at = time.perf_counter()
        if not self._saver.begin(state, validation_loss=validation_loss, background=background):
            self._finish(state.step)

    def _finish(self, step: int) -> None:
        in_use = {folder for observer in self._observers for folder in observer.checkpoints_in_use()}
        folder = self._saver.finish(in_use=in_use)
        self.saved_step = step
        for observer in self._observers:
            observer.on_save(Save(step, folder, time.perf_counter() - self._began_at))

    @contextmanager
    def _errors_logged(self, *, goes_on: bool) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            self.failed += 1
            if self._world.rank == 0 and goes_on:
                logger.error("NOT SAVED: %s; training continues, and the next checkpoint is tried as planned", error)
            elif self._world.rank == 0:
                logger.error("NOT SAVED: %s", error)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of the block, for which training waits."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds, goes_on = time.perf_counter() - began, self._saver.begun_step is not None
            self._waited += seconds
            if not goes_on:
                self._reported, self._waited = (self._reported or 0.0) + self._waited, 0.0
            for observer in self._observers:
                observer.on_save_wait(seconds, goes_on=goes_on)
