"""`trainshort track copy`: copy curves of runs once, or until the runs have ended. Imports no torch."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from configs.errors import TrainshortError
from configs.paths import incarnation_file
from launch.runs import reported_end
from launch.slurm.record import has_active_jobs
from training.curves.copy import CurveCopy, CurveWriter
from training.curves.trackers import TrackerRow
from training.tracking.ending import ending_of

logger = logging.getLogger(__name__)


def copy_curves(
    folders: Sequence[Path],
    *,
    tracker: TrackerRow,
    project: str,
    every: float | None,
    on_copied: Callable[[Path, int], None],
) -> list[TrainshortError]:
    """Copy the curves of runs; return why the last copy of some failed. The next one copies what they lack.

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
        opened = [stack.enter_context(CurveCopy(folder, tracker.package)) for folder in folders]
        copies = list[tuple[CurveCopy, CurveWriter]]()
        for copy in opened:  # now that no folder is refused
            writer = tracker.open(copy, project)
            stack.callback(writer.close)
            copies.append((copy, writer))
        problems = dict[Path, TrainshortError]()
        while copies:
            # asked before: what a run does until it has ended is then copied
            going_on = [pair for pair in copies if every is not None and not _has_ended(pair[0].run_dir)]
            for copy, writer in copies:
                try:
                    count = copy.update(writer)
                except TrainshortError as error:
                    if every is not None and copy.run_dir not in problems:  # once for each outage
                        logger.warning("%s; until it has ended, it is tried again every %g s", error, every)
                    problems[copy.run_dir] = error
                    continue
                problems.pop(copy.run_dir, None)
                if count or every is None:
                    on_copied(copy.run_dir, count)
            copies = going_on
            if copies and every is not None:
                time.sleep(every)
    return [*problems.values()]


def _has_ended(run_dir: Path) -> bool:
    if has_active_jobs(run_dir):
        return False
    # no start, as of an average; one that has told its end, on any machine; one that is seen to be dead
    return not incarnation_file(run_dir).is_file() or reported_end(run_dir) or ending_of(run_dir) is not None
