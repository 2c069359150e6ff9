"""`trainshort track copy`: copy curves of runs once, or until the runs have ended. Imports no torch."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from launch.slurm.record import has_active_jobs
from training.curves.copy import CurveCopy, CurveWriter
from training.curves.trackers import TrackerRow
from training.tracking.ending import ending_of


def copy_curves(
    folders: Sequence[Path],
    *,
    tracker: TrackerRow,
    project: str,
    every: float | None,
    on_copied: Callable[[Path, int], None],
) -> None:
    """Copy the curves of runs.

    Args:
        folders: Run folders.
        tracker: Where to.
        project: The project there.
        every: Seconds from one copy to the next, until the runs and their SLURM jobs have ended; None for one copy.
        on_copied: Called with a run folder and the number of steps and reports that were copied, each time there are.
    Raises:
        InputError: a folder holds no run, or cannot be written.
        MachineError: the tracker cannot be used, or another process copies a run there.
    """
    with ExitStack() as stack:
        copies = [_Opened(folder, tracker, project, stack) for folder in folders]
        while copies:
            # asked before: what a run does until it has ended is then copied
            ended = [copy for copy in copies if every is None or _has_ended(copy.run_dir)]
            for copy in copies:
                count = copy.update()
                if count or every is None:
                    on_copied(copy.run_dir, count)
            copies = [copy for copy in copies if copy not in ended]
            if copies and every is not None:
                time.sleep(every)


class _Opened:
    def __init__(self, folder: Path, tracker: TrackerRow, project: str, stack: ExitStack) -> None:
        self.run_dir = folder
        self._copy = stack.enter_context(CurveCopy(folder, tracker.package))
        self._writer: CurveWriter = tracker.open(self._copy, project)
        stack.callback(self._writer.close)

    def update(self) -> int:
        return self._copy.update(self._writer)


def _has_ended(run_dir: Path) -> bool:
    return not has_active_jobs(run_dir) and ending_of(run_dir) is not None
