"""RUN_DIR/evaluation: the newest report, and the report of each checkpoint in a folder of the checkpoint's name."""

from pathlib import Path
from typing import Any

from configs.errors import MachineError
from configs.files import try_folder
from training.evaluation.plot import draw_plot
from training.evaluation.report import write_report


class ReportNotWritten(MachineError):
    """An evaluation is done, but its report cannot be written.

    Attributes:
        report: The contents of report.json.
    """

    def __init__(self, message: str, *, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


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


def write_evaluation(report: dict[str, Any], folder: Path, *, name: str) -> tuple[Path, ...]:
    """Write a report under its checkpoint's name and as the newest; return the paths of the newest.

    Hold the folder's lock: the files of a report must be of one evaluation.

    Args:
        report: The contents of report.json.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
    Raises:
        ReportNotWritten: a disk is full or failing.
    """
    try:
        for place in (folder / name, folder):
            # report.json last: where it is, the others are too
            plot = draw_plot(report, place / "perplexity.png")
            files = (*write_report(report, place), plot)
        return files
    except OSError as error:
        raise ReportNotWritten(
            f"{error.filename or folder} cannot be written ({error.strerror}): the report stands only in the output of "
            "this command; free space and evaluate again to write it",
            report=report,
        ) from None
