"""`trainshort evaluate`: measure one checkpoint at many lengths."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import try_to_lock
from configs.paths import evaluation_folder
from configs.precisions import DEFAULT_PRECISION
from configs.protocols import WindowProtocol, parse_protocol
from training.checkpoint.read import open_checkpoint
from training.evaluation.folder import ReportNotWritten, check_evaluation_folder, write_evaluation
from training.evaluation.kept import report_label
from training.evaluation.perplexity import PerplexityResult, Scorer, measure_loss
from training.evaluation.progress import EvaluationProgress
from training.evaluation.provenance import provenance_of
from training.evaluation.report import build_report, protocol_name
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.evaluation.windows import place_windows
from training.model.single import inference_device, load_single
from training.model.windows import LosslessWindows
from training.observers import Status
from training.tracking.inputs import evaluation_input, inputs_event
from training.tracking.tables import evaluation_table, table_event
from training.tracking.tracker import MlflowTracker, attach, now_ms

logger = logging.getLogger(__name__)

# write what is finished once it has taken this long since the last time: a kill must not lose hours
_WRITE_SECONDS = 60.0


@dataclass(frozen=True)
class Measurement:
    """A measurement to make.

    Attributes:
        length: Inputs of a window, in tokens.
        protocol: How the window moves.
        inputs: Inputs of all windows, windows x length: a measure of the work.
    """

    length: int
    protocol: WindowProtocol
    inputs: int


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    lengths: tuple[int, ...] | None,
    protocols: tuple[str, ...] | None,
    data: Path | None,
    precision: str = DEFAULT_PRECISION,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint's perplexity and write the reports of RUN_DIR/evaluation: see `training.evaluation.kept`.

    If a measurement fails or is interrupted, the reports hold those that were finished.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        lengths: Lengths in tokens; by default the run's.
        protocols: nonoverlapping or sliding:STRIDE; by default the run's.
        data: A text file; by default the run's held-out text.
        precision: Value of `--precision`, whatever the checkpoint trained in.
        command: The command line, to be named in the report.
    Returns:
        The contents of report.json.
    Raises:
        InputError: the precision, the checkpoint, the text, a length or a protocol is wrong.
        MachineError: RUN_DIR/evaluation cannot be written. Both are raised before the model is loaded.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    inference_device(precision)
    opened = open_checkpoint(checkpoint)
    config, folder = opened.config, evaluation_folder(opened.run_dir)
    parsed = [parse_protocol(name) for name in protocols or config.evaluate.protocols]
    text = held_out_text(opened) if data is None else file_text(opened, data)
    measurements = plan_measurements(lengths or config.evaluation_lengths, parsed, tokens=len(text.tokens))
    # Not the name that was given, which may be a link.
    name = opened.path.resolve().name
    check_evaluation_folder(folder, name=name)
    # Attach now: the tracker's thread imports mlflow while the model runs.
    tracker = attach(opened.run_dir, uri=config.track.uri, offline=config.track.offline)
    provenance = provenance_of(opened, text.tokens, data=data, command=command)
    model = load_single(opened, precision=precision)
    build = partial(build_report, checkpoint=opened, certificate=model.certificate, text=text, provenance=provenance)
    record = _Record(build, folder, name)
    try:
        run_measurements(model, text, measurements, results=record.results, write=record.keep, attention=model.windows)
    except BaseException as error:  # Ctrl-C too
        record.keep_finished(of=len(measurements), error=error, tracker=tracker)
        raise
    logger.info("report: %s", record.keep(tracker=tracker))
    return record.report


@dataclass(frozen=True)
class _Record:
    """The results so far of an evaluation, and the reports that keep them.

    Attributes:
        build: Makes a report of results.
        folder: RUN_DIR/evaluation.
        name: Name of the checkpoint's folder.
        results: Those that are finished.
        began_ms: When the evaluation began, in milliseconds since the epoch.
    """

    build: Callable[[Sequence[PerplexityResult]], dict[str, Any]]
    folder: Path
    name: str
    results: list[PerplexityResult] = field(default_factory=list)
    began_ms: int = field(default_factory=now_ms)

    @property
    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        return self.build(self.results)

    def keep(self, *, tracker: MlflowTracker | None = None, status: Status = "FINISHED") -> Path:
        """Write the reports, and add them to the MLflow run of the training; return the Markdown of what is kept."""
        with try_to_lock(self.folder):
            files: Sequence[Path] = ()
            try:
                files = write_evaluation(self.report, self.folder, name=self.name)
            finally:
                if tracker is not None:  # within: the files that it sends must not be replaced meanwhile
                    label = report_label(self.report, self.folder)
                    _track(tracker, self.report, files, label=label, checkpoint=self.name)
                    _track_evaluation(
                        tracker, self.report, label=label, checkpoint=self.name, began_ms=self.began_ms, status=status
                    )
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
        elif isinstance(error, KeyboardInterrupt):  # an error speaks for itself
            logger.warning("stopped in the first measurement: nothing is written")


def plan_measurements(lengths: Sequence[int], protocols: Sequence[WindowProtocol], *, tokens: int) -> list[Measurement]:
    """Return one measurement per protocol and length; duplicates are dropped.

    Raises:
        InputError: a length or a stride does not fit. The message names all lengths that are too long for the text.
    """
    # place_windows reports only the first one: report all of them.
    too_long = [length for length in dict.fromkeys(lengths) if length > tokens - 1]
    if too_long and tokens > 1:
        named = ", ".join(map(str, too_long))
        raise InputError(
            f"the text has {tokens} tokens, too short for length {named}: use lengths up to {tokens - 1}, "
            "or give a longer text with --data"
        )
    measurements = []
    for protocol in dict.fromkeys(protocols):
        for length in dict.fromkeys(lengths):
            windows = place_windows(tokens, length=length, protocol=protocol)
            measurements.append(Measurement(length=length, protocol=protocol, inputs=windows.count * length))
    return measurements


def run_measurements(
    scorer: Scorer,
    text: EvaluationText,
    measurements: Sequence[Measurement],
    *,
    results: list[PerplexityResult],
    write: Callable[[], object],
    attention: LosslessWindows | None = None,
) -> None:
    """Make measurements, and show progress on the standard error stream.

    Args:
        scorer: The model.
        text: The text.
        measurements: What to measure, in this order.
        results: The result of each is added here when it is finished.
        write: Called between two measurements, so that long work is not lost.
        attention: Counts the scores that the model's attention computes; None if nothing counts them.
    """
    written_at, batch_tokens = time.monotonic(), scorer.batch_tokens
    # Count inputs, not windows: a long window takes longer.
    total = sum(measurement.inputs for measurement in measurements)
    with EvaluationProgress(inputs=total, measurements=len(measurements)) as progress:
        for measurement in measurements:
            if results and time.monotonic() - written_at > _WRITE_SECONDS:
                _try_to_write(write)
                written_at = time.monotonic()
            progress.begin(f"{measurement.protocol} at {measurement.length:,}")
            result = measure_loss(
                scorer,
                text.tokens,
                length=measurement.length,
                protocol=measurement.protocol,
                batch_tokens=batch_tokens,
                attention=attention,
                progress=progress.advance,
            )
            results.append(result)
            progress.finish(f"loss {result.loss:.4f}, perplexity {result.perplexity:,.2f}")


def _try_to_write(write: Callable[[], object]) -> None:
    try:
        write()
    except ReportNotWritten as error:  # the disk may have space again at the end
        logger.warning("not yet written: %s", error)


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
        kept = ("loss", "perplexity", "attention_density")
        values |= {f"{name}/{key}": result[key] for key in kept if key in result}
        tracker.metrics(result["length"], {f"{text_and_protocol}/{curve}/perplexity": result["perplexity"]})
    tracker.metrics(report["step"], values)
    tracker.put(inputs_event([evaluation_input(report)]))
    for file in files:
        tracker.artifact(file, folder=f"evaluation/{checkpoint}")
    if files:
        table = evaluation_table(files[0].parent.parent, label=label)
        tracker.put(table_event(f"evaluation/{label}.json", table))


def _track_evaluation(
    tracker: MlflowTracker, report: dict[str, Any], *, label: str, checkpoint: str, began_ms: int, status: Status
) -> None:
    """Log an evaluation as a run below that of the training, whose curves are over the length: runs can be compared."""
    results = report["results"]
    points = [
        (f"{protocol_name(result).replace(':', '_')}/{key}", result[key], result["length"])
        for result in results
        for key in ("loss", "perplexity")
    ]
    tracker.nested(
        f"evaluate {checkpoint}, {label}",
        kind="evaluate",
        params={
            "checkpoint": checkpoint,
            "step": report["step"],
            "text": label,
            "train_length": report["train_length"],
            "lengths": sorted({result["length"] for result in results}),
            "protocols": sorted({protocol_name(result) for result in results}),
        },
        points=points,
        began_ms=began_ms,
        status=status,
    )
