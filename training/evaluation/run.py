"""`trainshort evaluate`: one checkpoint at many lengths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.errors import InputError
from configs.paths import evaluation_folder
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.perplexity import Result, Scorer, measure_loss
from training.evaluation.plot import draw_plot
from training.evaluation.report import build_document, write_report
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.evaluation.windows import WindowProtocol, parse_protocol, place_windows
from training.model.single import load_single
from training.tracking.tracker import MlflowTracker, attach


@dataclass(frozen=True)
class Measurement:
    """One measurement to make; inputs are what the model has to read for it, windows x length."""

    length: int
    protocol: WindowProtocol
    inputs: int


def evaluate_checkpoint(
    checkpoint: Path, *, lengths: tuple[int, ...] | None, protocols: tuple[str, ...] | None, data: Path | None
) -> dict[str, Any]:
    """Measure a checkpoint's perplexity and write RUN_DIR/evaluation: report.json, report.md, perplexity.png.

    Args:
        checkpoint: A step folder, or a run folder for its newest.
        lengths: Lengths in tokens; the run's unless given.
        protocols: nonoverlapping or sliding:STRIDE; the run's unless given.
        data: A text file; the run's held-out text unless given.
    Returns:
        The document of report.json.
    Raises:
        InputError: checkpoint, text, a length or a protocol is wrong; said before the first computation.
    """
    opened = open_checkpoint(checkpoint)
    config = opened.config
    parsed = [parse_protocol(name) for name in protocols or config.evaluate.protocols]
    text = held_out_text(opened) if data is None else file_text(opened, data)
    jobs = plan_jobs(lengths or config.evaluation_lengths, parsed, tokens=len(text.tokens))
    # now, so that the tracker's thread has imported mlflow by the time there is something to log
    tracker = attach(opened.run_dir, uri=config.track.uri)
    model = load_single(opened)
    results = run_jobs(model, text, jobs)
    document = build_document(
        results,
        checkpoint=opened.path,
        step=opened.step,
        train_length=config.data.sequence_length,
        certificate=model.certificate,
        text=text,
    )
    folder = evaluation_folder(opened.run_dir)
    files = [*write_report(document, folder), draw_plot(document, folder / "perplexity.png")]
    if tracker is not None:
        _track(tracker, opened, results, files)
    return document


def plan_jobs(lengths: Sequence[int], protocols: Sequence[WindowProtocol], *, tokens: int) -> list[Measurement]:
    """Return the measurements of every protocol at every length, each once.

    Raises:
        InputError: a length or a stride does not fit; all lengths that the text is too short for are named at once.
    """
    too_long = [length for length in dict.fromkeys(lengths) if length > tokens - 1]
    if too_long and tokens > 1:
        named = ", ".join(map(str, too_long))
        raise InputError(
            f"the text has {tokens} tokens, too short for length {named}: use lengths up to {tokens - 1}, "
            "or give a longer text with --data"
        )
    jobs = []
    for protocol in dict.fromkeys(protocols):
        for length in dict.fromkeys(lengths):
            windows = place_windows(tokens, length=length, protocol=protocol)
            jobs.append(Measurement(length=length, protocol=protocol, inputs=windows.count * length))
    return jobs


def run_jobs(scorer: Scorer, text: EvaluationText, jobs: Sequence[Measurement]) -> list[Result]:
    """Return a result per job, showing progress on the standard error stream."""
    results = []
    with _progress(sum(job.inputs for job in jobs)) as (progress, task):
        for job in jobs:
            progress.update(task, description=f"{job.protocol} at {job.length:,}")
            result = measure_loss(
                scorer,
                text.tokens,
                length=job.length,
                protocol=job.protocol,
                progress=lambda inputs: progress.advance(task, inputs),
            )
            results.append(result)
    return results


@contextmanager
def _progress(total: int) -> Iterator[tuple[Progress, Any]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        yield bar, bar.add_task("evaluation", total=total)


def _track(tracker: MlflowTracker, checkpoint: Checkpoint, results: Sequence[Result], files: Sequence[Path]) -> None:
    """Add to the training's MLflow run; one metric per protocol and length, so that checkpoints compare."""
    values: dict[str, float] = {}
    for result in results:
        # MLflow allows no colon in a name on every system
        name = f"evaluation/{str(result.protocol).replace(':', '_')}/{result.length}"
        values |= {f"{name}/loss": result.loss, f"{name}/perplexity": result.perplexity}
    tracker.metrics(checkpoint.step, values)
    for file in files:
        tracker.artifact(file, folder="evaluation")
    tracker.close()
