"""`trainshort evaluate`: measure one checkpoint at many lengths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.errors import InputError
from configs.files import try_to_lock
from configs.paths import evaluation_folder
from configs.terminal import status_console
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.folder import check_evaluation_folder, write_evaluation
from training.evaluation.perplexity import PerplexityResult, Scorer, measure_loss
from training.evaluation.report import build_report
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.evaluation.windows import WindowProtocol, parse_protocol, place_windows
from training.model.single import load_single
from training.tracking.tracker import MlflowTracker, attach


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
    checkpoint: Path, *, lengths: tuple[int, ...] | None, protocols: tuple[str, ...] | None, data: Path | None
) -> dict[str, Any]:
    """Measure a checkpoint's perplexity and write report.json, report.md and perplexity.png.

    They are written to RUN_DIR/evaluation, and to a folder in it that has the checkpoint's name.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        lengths: Lengths in tokens; by default the run's.
        protocols: nonoverlapping or sliding:STRIDE; by default the run's.
        data: A text file; by default the run's held-out text.
    Returns:
        The contents of report.json.
    Raises:
        InputError: the checkpoint, the text, a length or a protocol is wrong; raised before the model is loaded.
        MachineError: RUN_DIR/evaluation cannot be written; raised before the model is loaded.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    opened = open_checkpoint(checkpoint)
    config = opened.config
    parsed = [parse_protocol(name) for name in protocols or config.evaluate.protocols]
    text = held_out_text(opened) if data is None else file_text(opened, data)
    measurements = plan_measurements(lengths or config.evaluation_lengths, parsed, tokens=len(text.tokens))
    folder = evaluation_folder(opened.run_dir)
    # Not the name that was given, which may be a link.
    name = opened.path.resolve().name
    check_evaluation_folder(folder, name=name)
    # Attach now: the tracker's thread imports mlflow while the model runs.
    tracker = attach(opened.run_dir, uri=config.track.uri)
    model = load_single(opened)
    results = run_measurements(model, text, measurements)
    report = build_report(
        results,
        checkpoint=opened.path,
        step=opened.step,
        train_length=config.data.sequence_length,
        certificate=model.certificate,
        text=text,
    )
    files: Sequence[Path] = ()
    with try_to_lock(folder):
        try:
            files = write_evaluation(report, folder, name=name)
        finally:
            if tracker is not None:  # within: the files that it sends must not be replaced meanwhile
                _track(tracker, opened, results, files)
    return report


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
    scorer: Scorer, text: EvaluationText, measurements: Sequence[Measurement]
) -> list[PerplexityResult]:
    """Return one result per measurement; show progress on the standard error stream."""
    results = []
    # Count inputs, not windows: a long window takes longer.
    with _progress(sum(measurement.inputs for measurement in measurements)) as (progress, task):
        for measurement in measurements:
            progress.update(task, description=f"{measurement.protocol} at {measurement.length:,}")
            result = measure_loss(
                scorer,
                text.tokens,
                length=measurement.length,
                protocol=measurement.protocol,
                progress=lambda inputs: progress.advance(task, inputs),
            )
            results.append(result)
    return results


@contextmanager
def _progress(total: int) -> Iterator[tuple[Progress, Any]]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=status_console(),
        transient=True,
    )
    with bar:
        yield bar, bar.add_task("evaluation", total=total)


def _track(
    tracker: MlflowTracker, checkpoint: Checkpoint, results: Sequence[PerplexityResult], files: Sequence[Path]
) -> None:
    """Add the results to the MLflow run of the training.

    Log one metric per protocol and length at the checkpoint's step, so that checkpoints of a run can be compared.
    """
    values: dict[str, float] = {}
    for result in results:
        # MLflow does not allow a colon in a name on every system.
        name = f"evaluation/{str(result.protocol).replace(':', '_')}/{result.length}"
        values |= {f"{name}/loss": result.loss, f"{name}/perplexity": result.perplexity}
    tracker.metrics(checkpoint.step, values)
    for file in files:
        tracker.artifact(file, folder="evaluation")
    tracker.close()
