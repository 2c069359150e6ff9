"""The trackers that a run's curves can be copied to. Imports no torch, and none of the trackers."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from configs.errors import InputError, MachineError

if TYPE_CHECKING:  # every command reads the table for its help, and would wait for what a copy needs
    from training.curves.copy import CurveCopy, CurveWriter


def _tensorboard(copy: "CurveCopy", project: str) -> "CurveWriter":
    from training.curves.tensorboard import TensorBoardWriter

    return TensorBoardWriter(copy)


def _wandb(copy: "CurveCopy", project: str) -> "CurveWriter":
    from training.curves.weights_and_biases import WandbWriter

    return WandbWriter(copy, project=project)


@dataclass(frozen=True)
class TrackerRow:
    """One tracker.

    Attributes:
        package: Its distribution and module; also the extra of ours that installs it, and the folder in RUN_DIR.
        open: Begins or goes on with a run there, in a project if it has projects.
    """

    package: str
    open: "Callable[[CurveCopy, str], CurveWriter]"


TRACKERS = {row.package: row for row in (TrackerRow("tensorboard", _tensorboard), TrackerRow("wandb", _wandb))}


def require_tracker(name: str) -> TrackerRow:
    """Return the row of a tracker.

    Raises:
        InputError: it is not known.
        MachineError: its package is not installed.
    """
    if name not in TRACKERS:
        raise InputError(f"--to {name!r} is not known: use {' or '.join(TRACKERS)}")
    row = TRACKERS[name]
    if find_spec(row.package) is None:
        raise MachineError(f"{row.package} is not installed: run pip install 'trainshort[{row.package}]'")
    return row
