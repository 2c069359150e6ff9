"""Keep the results of an evaluation: in reports, and in the MLflow run of the training."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.files import try_to_lock
from training.evaluation.folder import write_evaluation
from training.evaluation.kept import report_label
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.results import protocol_name
from training.evaluation.tracked import tracked_protocol, tracked_values
from training.observers import Status
from training.tracking.inputs import evaluation_input
from training.tracking.measured import TrackedMeasurement, track_measurement
from training.tracking.spool import now_ms
from training.tracking.tables import evaluation_table, table_event
from training.tracking.tracker import MlflowTracker

logger = logging.getLogger(__name__)


@dataclass
class EvaluationRecord:
    """The results so far of an evaluation, and the reports that keep them.

    Attributes:
        build: Makes a report of results.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
        is_newest: Whether the newest report of the run is replaced too.
        results: What was measured.
        context: What was measured of the context.
        began_ms: When the evaluation began, in milliseconds since the epoch.
    """

    build: Callable[..., dict[str, Any]]
    folder: Path
    name: str
    is_newest: bool = True
    results: list[PerplexityResult] = field(default_factory=list)
    context: dict[str, Any] | None = None
    began_ms: int = field(default_factory=now_ms)

    @property
    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        return self.build(self.results, context=self.context)

    def keep(self, *, tracker: MlflowTracker | None = None, status: Status = "FINISHED") -> Path:
        """Write the reports, and add them to the MLflow run of the training; return the Markdown of what is kept."""
        with try_to_lock(self.folder):
            files: Sequence[Path] = ()
            try:
                files = write_evaluation(self.report, self.folder, name=self.name, is_newest=self.is_newest)
            finally:
                if tracker is not None:  # within: the files that it sends must not be replaced meanwhile
                    label = report_label(self.report, self.folder)
                    path = f"evaluation/{label}.json"
                    table = table_event(path, evaluation_table(self.folder, label=label)) if files else None
                    measured = tracked_evaluation(self.report, label=label, checkpoint=self.name)
                    began_ms = self.began_ms
                    track_measurement(tracker, measured, files=files, table=table, began_ms=began_ms, status=status)
        return files[1]

    def keep_finished(self, *, of: int, error: BaseException, tracker: MlflowTracker | None) -> None:
        """Keep what is finished of an evaluation that an error or Ctrl-C has ended, and say so.

        Args:
            of: Number of measurements to make.
            error: What ended it.
            tracker: Attached to the MLflow run of the training.
        """
        if self.results:
            status: Status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            kept = self.keep(tracker=tracker, status=status)
            logger.warning("stopped after %d of %d measurements, which are kept: %s", len(self.results), of, kept)
        if isinstance(error, KeyboardInterrupt):  # an error speaks for itself
            logger.warning("to go on from where it was, give the same command again")


def tracked_evaluation(report: dict[str, Any], *, label: str, checkpoint: str) -> TrackedMeasurement:
    """Return a report as MLflow gets it.

    One metric per protocol and length has the checkpoint's step, so that checkpoints of a run can be compared. One per
    protocol and checkpoint has the length as its step, and so have those of the run below: MLflow then draws perplexity
    against length.

    Args:
        report: The contents of report.json.
        label: The report's label: its text and precision.
        checkpoint: Name of the checkpoint's folder.
    """
    results = report["results"]
    curves: list[tuple[int, dict[str, float]]] = []
    points: list[tuple[str, float, int]] = []
    curve = re.sub(r"[^\w.-]", "_", checkpoint, flags=re.ASCII)  # a user may have renamed the folder
    for result in results:
        protocol, length = tracked_protocol(result), result["length"]
        curves.append((length, {f"evaluation/{label}/{protocol}/{curve}/perplexity": result["perplexity"]}))
        points += [(f"{protocol}/{key}", result[key], length) for key in ("loss", "perplexity")]
    return TrackedMeasurement(
        kind="evaluate",
        name=f"evaluate {checkpoint}, {label}",
        folder=f"evaluation/{checkpoint}",
        values=[*curves, (report["step"], tracked_values(report, label=label))],
        params={
            "checkpoint": checkpoint,
            "step": report["step"],
            "text": label,
            "train_length": report["train_length"],
            "lengths": sorted({result["length"] for result in results}),
            "protocols": sorted({protocol_name(result) for result in results}),
        },
        points=points,
        datasets=[evaluation_input(report)],
    )
