"""Write RUN_DIR/evaluation: a report per checkpoint, text and precision; see `training.evaluation.kept`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import InputError, MachineError
from configs.files import move_aside, try_folder
from training.evaluation.kept import NEWEST, NEWEST_PLOT, read_report, report_label
from training.evaluation.plot import draw_plot
from training.evaluation.report import merge_reports, write_report

logger = logging.getLogger(__name__)


class ReportNotWritten(MachineError):
    """An evaluation is done, but its report cannot be written.

    Attributes:
        report: The contents of report.json.
    """

    def __init__(self, message: str, *, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


@contextmanager
def failed_write_keeps(report: dict[str, Any], *, folder: Path) -> Iterator[None]:
    """Turn a failed write of a report into an error that holds the report.

    Args:
        report: Its contents.
        folder: Where it is written.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    try:
        yield
    except OSError as error:
        raise ReportNotWritten(
            f"{error.filename or folder} cannot be written ({error.strerror}): the report is only in the output of "
            "this command; free space and run it again",
            report=report,
        ) from None


def check_evaluation_folder(folder: Path, *, name: str) -> None:
    """Make the folders of `write_evaluation`, and refuse those that no report could be written to.

    Raises:
        MachineError: one cannot be made, or no file can be made in it.
    """
    for place in (folder, folder / name):
        try:
            # Made here, since `try_folder` would remove it again, which another evaluation may have begun to use.
            place.mkdir(parents=True, exist_ok=True)
            try_folder(place)
        except OSError as error:
            raise MachineError(
                f"evaluation folder {place} cannot be written ({error.strerror}): free space, fix its permissions, or "
                "evaluate a copy of the run folder"
            ) from None


def write_evaluation(report: dict[str, Any], folder: Path, *, name: str, is_newest: bool = True) -> tuple[Path, ...]:
    """Add a report to what is kept of its checkpoint, text and precision, and write it as the newest.

    Return the JSON, Markdown and PNG of what is kept.

    Hold the folder's lock: the files of a report must be of one evaluation.

    Args:
        report: The contents of report.json.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
        is_newest: Whether it replaces the newest report of the run.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    with failed_write_keeps(report, folder=folder):
        label = report_label(report, folder)
        kept = _with_earlier(report, folder / name / f"{label}.json")
        files = _write(kept, folder / name, name=label, plot=f"{label}.png")
        if is_newest:
            _write(report, folder, name=NEWEST, plot=NEWEST_PLOT)
    return files


def _write(report: dict[str, Any], folder: Path, *, name: str, plot: str) -> tuple[Path, ...]:
    # the JSON last: where it is, the others are too
    picture = draw_plot(report, folder / plot)
    return (*write_report(report, folder, name=name, plot=plot), picture)


def _with_earlier(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a report with the results kept at a path; results that do not belong to it are moved aside there."""
    try:
        earlier = read_report(path) if path.exists() else None
        merged = report if earlier is None else merge_reports(earlier, report)
    except (InputError, KeyError, TypeError):  # broken, or of another version
        merged = None
    if merged is not None:
        return merged
    aside = move_aside(path, date=report["date"])
    logger.warning("%s was of other weights, text, attention or precision: it is now %s", path, aside.name)
    return report
