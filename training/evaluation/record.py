"""The results of an evaluation, as they are kept: reports, and the MLflow run of the training."""

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
from training.observers import Status
from training.tracking.inputs import evaluation_input, inputs_event
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
                    _track(tracker, self.report, files, label=label, checkpoint=self.name)
                    self._track_below(tracker, label=label, status=status)
                    tracker.close()
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

    def _track_below(self, tracker: MlflowTracker, *, label: str, status: Status) -> None:
        """Log the evaluation as a run below that of the training, with curves over the length: runs can be compared."""
        report = self.report
        results = report["results"]
        points = [
            (f"{protocol_name(result).replace(':', '_')}/{key}", result[key], result["length"])
            for result in results
            for key in ("loss", "perplexity")
        ]
        tracker.nested(
            f"evaluate {self.name}, {label}",
            kind="evaluate",
            params={
                "checkpoint": self.name,
                "step": report["step"],
                "text": label,
                "train_length": report["train_length"],
                "lengths": sorted({result["length"] for result in results}),
                "protocols": sorted({protocol_name(result) for result in results}),
            },
            points=points,
            began_ms=self.began_ms,
            status=status,
        )


def _track(
    tracker: MlflowTracker, report: dict[str, Any], files: Sequence[Path], *, label: str, checkpoint: str
) -> None:
    """Add a report to the MLflow run of the training.

    Log one metric per protocol and length at the checkpoint's step, so that checkpoints of a run can be compared. Log
    one per protocol and checkpoint with the length as MLflow's step: MLflow then draws perplexity against length.

    Args:
        tracker: Attached to the MLflow run.
        report: The contents of report.json.
        files: Sent to the folder evaluation/CHECKPOINT of the run's artifacts.
        label: The report's label: its text and precision.
        checkpoint: Name of the checkpoint's folder.
    """
    values: dict[str, float] = {}
    curve = re.sub(r"[^\w.-]", "_", checkpoint, flags=re.ASCII)  # a user may have renamed the folder
    for result in report["results"]:
        # MLflow does not allow a colon in a name on every system.
        text_and_protocol = f"evaluation/{label}/{protocol_name(result).replace(':', '_')}"
        name = f"{text_and_protocol}/{result['length']}"
        kept = ("loss", "perplexity", "bits_per_byte", "standard_error", "attention_density")
        values |= {f"{name}/{key}": result[key] for key in kept if key in result}
        tracker.metrics(result["length"], {f"{text_and_protocol}/{curve}/perplexity": result["perplexity"]})
    verdict = {key: report["verdict"][key] for key in ("usable_length", "effective_context")}
    values |= {f"evaluation/{label}/{key}": value for key, value in verdict.items() if value is not None}
    tracker.metrics(report["step"], values)
    tracker.put(inputs_event([evaluation_input(report)]))
    for file in files:
        tracker.artifact(file, folder=f"evaluation/{checkpoint}")
    if files:
        table = evaluation_table(files[0].parent.parent, label=label)
        tracker.put(table_event(f"evaluation/{label}.json", table))
