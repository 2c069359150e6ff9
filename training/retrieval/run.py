"""`trainshort retrieval`: ask one checkpoint for what it has read, at many lengths and depths."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.errors import InputError
from configs.files import in_use
from configs.paths import evaluation_folder
from configs.positions import scale_for
from data_pipeline.text import TokenStream, file_stream, held_out_stream
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.folder import check_evaluation_folder
from training.evaluation.precheck import run_data
from training.evaluation.progress import EvaluationProgress
from training.evaluation.provenance import evaluated_model, provenance_of
from training.model.single import inference_device, load_single
from training.observers import Status
from training.retrieval.cells import RetrievalCell
from training.retrieval.kept import RETRIEVAL_FOLDER
from training.retrieval.prompts import Prompt, PromptMaker, make_haystack
from training.retrieval.record import keep_retrieval
from training.retrieval.report import build_retrieval_report
from training.retrieval.request import RetrievalRequest
from training.retrieval.scoring import CHANCE, PromptScore, RetrievalModel, prompts_at_once, score_prompts
from training.retrieval.tasks import RetrievalTask, require_tasks
from training.tracking.spool import now_ms
from training.tracking.tracker import attached

logger = logging.getLogger(__name__)


def measure_retrieval(checkpoint: Path, request: RetrievalRequest) -> dict[str, Any]:
    """Measure a checkpoint; keep the report in RUN_DIR/evaluation, and in the MLflow run of the training.

    If a measurement fails or is interrupted, the report holds those that were finished.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
    Returns:
        The contents of the report.
    Raises:
        InputError: the checkpoint, the scale, the text or a length is wrong.
        MachineError: RUN_DIR/evaluation cannot be written. Both are raised before the model is loaded.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    inference_device(request.precision)
    opened = open_checkpoint(checkpoint)
    folder, name = evaluation_folder(opened.run_dir), opened.path.resolve().name
    lengths = request.resolved_lengths(train_length=opened.train_length)
    stream = _read_text(opened, request.data)
    tokenizer = load_tokenizer(opened.tokenizer)
    haystack = make_haystack(stream.tokens, tokenizer, longest=lengths[-1])
    maker = PromptMaker(haystack, tokenizer, seed=request.seed)
    parts = plan_retrieval(request, maker, lengths=lengths)
    check_evaluation_folder(folder, name=f"{name}/{RETRIEVAL_FOLDER}")
    provenance = provenance_of(opened, stream.tokens, data=request.data, command=request.command)
    scale = None if request.scale is None else scale_for(request.scale, opened.config.model)
    track = opened.config.track
    # Attach now: the tracker's thread imports mlflow while the model runs.
    with in_use(opened.path.parent), attached(opened.run_dir, uri=track.uri, offline=track.offline) as tracker:
        keep = partial(keep_retrieval, folder=folder, name=name, tracker=tracker, began_ms=now_ms())
        model = load_single(opened, precision=request.precision, scale=scale)
        build = partial(
            build_retrieval_report,
            model=evaluated_model(opened, model.certificate),
            text=(stream.name, len(haystack.tokens)),
            request=request,
            provenance=provenance,
            chance=CHANCE,
        )
        return _measure(partial(ask, model, maker, tokenizer, parts), build=build, keep=keep)


def _measure(
    ask_all: Callable[..., None], *, build: Callable[..., dict[str, Any]], keep: Callable[..., Path]
) -> dict[str, Any]:
    """Ask all questions, and keep the report; if that is interrupted, one of what is finished.

    Args:
        ask_all: Adds to `cells`, which it is given, those of each part that is finished.
        build: Makes the report of cells.
        keep: Keeps a report, and returns its Markdown.
    """
    cells: list[RetrievalCell] = []
    try:
        ask_all(cells=cells)
    except BaseException as error:  # Ctrl-C too
        if cells:
            status: Status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            logger.warning("stopped early; what is finished is kept: %s", keep(build(cells), status=status))
        raise
    report = build(cells)
    logger.info("report: %s", keep(report))
    return report


def _read_text(checkpoint: Checkpoint, data: Path | None) -> TokenStream:
    if data is not None:
        return file_stream(data, checkpoint.tokenizer)
    config = checkpoint.config
    return held_out_stream(run_data(checkpoint.path, config=config), split=config.data.split)


@dataclass(frozen=True)
class RetrievalPart:
    """What is measured of one task at one length.

    Attributes:
        task: The task.
        length: Tokens of prompt and answer.
        depths: Depths of the asked needle.
        samples: Prompts of each depth.
    """

    task: RetrievalTask
    length: int
    depths: Sequence[float | None]
    samples: int

    @property
    def inputs(self) -> int:
        """Tokens of all prompts: a measure of the work."""
        return self.length * self.samples * len(self.depths)


def plan_retrieval(request: RetrievalRequest, maker: PromptMaker, *, lengths: Sequence[int]) -> list[RetrievalPart]:
    """Return the parts of a measurement, in the order of the report.

    Raises:
        InputError: a length is too short for a task; the message names all such tasks.
    """
    tasks = require_tasks(request.tasks)
    needed = {task.name: maker.shortest(task) for task in tasks}
    if too_long := {name: shortest for name, shortest in needed.items() if lengths[0] < shortest}:
        named = ", ".join(f"{name} ({shortest})" for name, shortest in too_long.items())
        raise InputError(
            f"length {lengths[0]} is too short for the needles and the question of {named}: use --lengths from "
            f"{max(too_long.values())}, or leave such --tasks out"
        )
    return [
        RetrievalPart(task, length, request.depths_of(task), request.samples_of(task))
        for task in tasks
        for length in lengths
    ]


def ask(
    model: RetrievalModel,
    maker: PromptMaker,
    tokenizer: Tokenizer,
    parts: Sequence[RetrievalPart],
    *,
    cells: list[RetrievalCell],
) -> None:
    """Ask a model all questions, and show progress on the standard error stream.

    Args:
        model: The model.
        maker: Makes the prompts.
        tokenizer: The model's tokenizer.
        parts: What to measure.
        cells: Those of a part are added here when it is finished.
    """
    with EvaluationProgress(inputs=sum(part.inputs for part in parts), measurements=len(parts)) as progress:
        for part in parts:
            progress.begin(f"{part.task.name} at {part.length:,}")
            model.fit_length(part.length)
            scores: dict[float | None, list[PromptScore]] = {depth: [] for depth in part.depths}
            prompts = _prompts(part, maker)
            while batch := list(islice(prompts, prompts_at_once(part.length))):
                scored = score_prompts(model, [prompt for _, prompt in batch], tokenizer)
                for (depth, _), score in zip(batch, scored, strict=True):
                    scores[depth].append(score)
                progress.advance(len(batch) * part.length)
            made = [RetrievalCell(part.task.name, part.length, depth, each) for depth, each in scores.items()]
            cells += made
            all_scores = [score for cell in made for score in cell.scores]
            recall, choice = fmean(s.recall for s in all_scores), fmean(s.choice for s in all_scores)
            progress.finish(f"recall {recall:.0%}, choice {choice:.0%}")


def _prompts(part: RetrievalPart, maker: PromptMaker) -> Iterator[tuple[float | None, Prompt]]:
    for depth in part.depths:
        for number in range(part.samples):
            yield depth, maker.make(part.task, length=part.length, depth=depth, number=number)
