"""A run's curves as a run of Weights & Biases, whose own files are in RUN_DIR/wandb."""

from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from configs.errors import MachineError, first_line
from training.curves.copy import CurveCopy, Evaluation
from training.tracking.names import flatten

STEP = "step"


class WandbWriter:
    """Implement `CurveWriter`. A step that is taken again is logged again, so its curves have both values."""

    def __init__(self, copy: CurveCopy, *, project: str) -> None:
        """Take the copy, and the name of the project.

        Raises:
            MachineError: wandb begins no run: it is not logged in, or its server is not reached.
        """
        try:
            self._run: Any = wandb.init(
                project=project,
                id=copy.tracker_id(),
                resume="allow",
                reinit="create_new",  # else the second of two run folders writes to the first one's run
                name=copy.name,
                dir=str(copy.run_dir),
                config=flatten(copy.config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise MachineError(
                f"wandb begins no run ({first_line(error)}): fix that; without a login, run `wandb login`, or set "
                "WANDB_MODE=offline and run `wandb sync` later"
            ) from None
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def start(self, *, first_step: int) -> None:
        """See `CurveWriter`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `CurveWriter`."""
        self._run.log({STEP: step, **values})

    def write_evaluations(self, evaluations: Sequence[Evaluation]) -> None:
        """See `CurveWriter`."""
        for evaluation in evaluations:
            if evaluation.is_new:
                self.write(evaluation.step, evaluation.values)

    def flush(self) -> None:
        """See `CurveWriter`: wandb's own process sends what it gets."""

    def close(self) -> None:
        """See `CurveWriter`."""
        self._run.finish()
