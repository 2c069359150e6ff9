"""`trainshort evaluate`: measure one checkpoint at many lengths."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from configs.files import try_to_lock
from configs.paths import evaluation_folder
from configs.protocols import parse_protocol
from training.checkpoint.read import open_checkpoint
from training.evaluation.context import ContextPlan, plan_context, run_context
from training.evaluation.folder import check_evaluation_folder, write_evaluation
from training.evaluation.kept import report_label
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.progress import EvaluationProgress
from training.evaluation.provenance import provenance_of
from training.evaluation.report import build_report
from training.evaluation.request import EvaluationRequest
from training.evaluation.resampling import units_of
from training.evaluation.results import protocol_name
from training.evaluation.sweep import Measurement, plan_measurements, run_measurements
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.model.single import SingleModel, inference_device, load_single
from training.tracking.tracker import MlflowTracker, attach

logger = logging.getLogger(__name__)


def evaluate_checkpoint(checkpoint: Path, request: EvaluationRequest) -> dict[str, Any]:
    """Measure a checkpoint's perplexity and write the reports of RUN_DIR/evaluation: see `training.evaluation.kept`.

    If a measurement fails or is interrupted, the reports hold those that were finished.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
    Returns:
        The contents of report.json.
    Raises:
        InputError: the precision, the checkpoint, the text, a length or a protocol is wrong.
        MachineError: RUN_DIR/evaluation cannot be written. Both are raised before the model is loaded.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    inference_device(request.precision)
    opened = open_checkpoint(checkpoint)
    config, folder = opened.config, evaluation_folder(opened.run_dir)
    parsed = [parse_protocol(name) for name in request.protocols or config.evaluate.protocols]
    text = held_out_text(opened) if request.data is None else file_text(opened, request.data)
    lengths = request.lengths or config.evaluation_lengths
    measurements = plan_measurements(lengths, parsed, tokens=len(text.tokens), on_same_tokens=request.same_tokens)
    plan = plan_context(len(text.tokens), longest=max(lengths)) if request.context else None
    # Not the name that was given, which may be a link.
    name = opened.path.resolve().name
    check_evaluation_folder(folder, name=name)
    # Attach now: the tracker's thread imports mlflow while the model runs.
    tracker = attach(opened.run_dir, uri=config.track.uri)
    provenance = provenance_of(opened, text.tokens, data=request.data, command=request.command)
    model = load_single(opened, precision=request.precision)
    build = partial(build_report, checkpoint=opened, certificate=model.certificate, text=text, provenance=provenance)
    record = _Record(build, folder, name)
    try:
        _measure(model, text, measurements, plan=plan, record=record)
    except BaseException as error:  # Ctrl-C too
        record.keep_finished(of=len(measurements), error=error, tracker=tracker)
        raise
    logger.info("report: %s", record.keep(tracker=tracker))
    return record.report


def _measure(
    model: SingleModel,
    text: EvaluationText,
    measurements: Sequence[Measurement],
    *,
    plan: ContextPlan | None,
    record: "_Record",
) -> None:
    """Make the measurements and then, if there is a plan, those of the context; show progress."""
    units = units_of(text.documents, tokens=len(text.tokens))
    # Count inputs, not windows: a long window takes longer.
    inputs = sum(each.inputs for each in measurements) + (0 if plan is None else plan.inputs)
    with EvaluationProgress(inputs=inputs, measurements=len(measurements) + (plan is not None)) as progress:
        run_measurements(
            model,
            text,
            measurements,
            units=units,
            results=record.results,
            write=record.keep,
            progress=progress,
            attention=model.windows,
        )
        if plan is not None:
            progress.begin("context")
            record.context = run_context(
                model, text.tokens, plan, units=units, batch_tokens=model.batch_tokens, progress=progress.advance
            )
            progress.finish(f"effective context {record.context['effective_context']:,}")


@dataclass
class _Record:
    """The results so far of an evaluation, and the reports that keep them.

    Attributes:
        build: Makes a report of results.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
        context: What was measured of the context.
    """

    build: Callable[..., dict[str, Any]]
    folder: Path
    name: str
    results: list[PerplexityResult] = field(default_factory=list)
    context: dict[str, Any] | None = None

    @property
    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        return self.build(self.results, context=self.context)

    def keep(self, *, tracker: MlflowTracker | None = None) -> Path:
        """Write the reports, and add them to the MLflow run of the training; return the Markdown of what is kept."""
        with try_to_lock(self.folder):
            files: Sequence[Path] = ()
            try:
                files = write_evaluation(self.report, self.folder, name=self.name)
            finally:
                if tracker is not None:  # within: the files that it sends must not be replaced meanwhile
                    label = report_label(self.report, self.folder)
                    _track(tracker, self.report, files, label=label, checkpoint=self.name)
        return files[1]

    def keep_finished(self, *, of: int, error: BaseException, tracker: MlflowTracker | None) -> None:
        """Keep what is finished of an evaluation that an error or Ctrl-C has ended, and say so.

        Args:
            of: Number of measurements to make.
            error: What ended it.
            tracker: Attached to the MLflow run of the training.
        """
        if self.results:
            kept = self.keep(tracker=tracker)
            logger.warning("stopped after %d of %d measurements, which are kept: %s", len(self.results), of, kept)
        elif isinstance(error, KeyboardInterrupt):  # an error speaks for itself
            logger.warning("stopped in the first measurement: nothing is written")


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
    for file in files:
        tracker.artifact(file, folder=f"evaluation/{checkpoint}")
    tracker.close()
