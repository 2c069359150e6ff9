"""`trainshort evaluate`: measure one checkpoint at many lengths, in one process or on ranks."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from configs.files import in_use
from configs.paths import evaluation_folder
from configs.positions import scale_for
from configs.protocols import parse_protocol
from configs.scales import PositionScale
from configs.schema import RunConfig
from parallel.collectives import broadcast_from_first
from parallel.groups import make_groups
from parallel.start import ProcessRank, ignore_stop_signals, start, stop
from training.checkpoint.read import Checkpoint, open_checkpoint, open_on_all_ranks
from training.evaluation.attention_weight import measure_weights
from training.evaluation.context import ContextPlan, plan_context, run_context
from training.evaluation.folder import check_evaluation_folder
from training.evaluation.partial import PartialResults
from training.evaluation.perplexity import Scorer
from training.evaluation.precheck import evaluation_layout
from training.evaluation.progress import EvaluationProgress
from training.evaluation.provenance import Provenance, evaluated_model, provenance_of
from training.evaluation.record import EvaluationRecord
from training.evaluation.report import build_report
from training.evaluation.request import EvaluationRequest
from training.evaluation.resampling import units_of
from training.evaluation.sweep import Measurement, plan_measurements, run_measurements
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.model.attention import AttentionBlock
from training.model.distributed import load_distributed
from training.model.single import inference_device, load_single
from training.model.windows import LosslessWindows
from training.tracking.tracker import MlflowTracker, attached

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure, in this order.

    Attributes:
        measurements: A protocol at a length each.
        context: How much of its context the model uses; None if that was not asked for.
        scale: Scales the model's positions; None to leave them as trained.
    """

    measurements: list[Measurement]
    context: ContextPlan | None
    scale: PositionScale | None = None

    @property
    def count(self) -> int:
        """Measurements, the context's as one."""
        return len(self.measurements) + (self.context is not None)


def evaluate_checkpoint(checkpoint: Path, request: EvaluationRequest) -> dict[str, Any]:
    """Measure a checkpoint's perplexity and write the reports of RUN_DIR/evaluation: see `training.evaluation.kept`.

    If a measurement fails or is interrupted, the reports hold those that were finished, and the same evaluation goes on
    from there.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
    Returns:
        The contents of report.json.
    Raises:
        InputError: the precision, the checkpoint, the scale, the text, a length or a protocol is wrong.
        MachineError: RUN_DIR/evaluation cannot be written. Both are raised before the model is loaded.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    inference_device(request.precision)
    opened = open_checkpoint(checkpoint)
    with ExitStack() as stack:
        begun = _begin(opened, request, until=stack)
        model = load_single(opened, precision=request.precision, scale=begun.plan.scale)
        return begun.measure_with(model, blocks=model.blocks)


def evaluate_rank(checkpoint: Path, request: EvaluationRequest, process: ProcessRank) -> dict[str, Any] | None:
    """Measure a checkpoint on the ranks of the request's layout, as `evaluate_checkpoint` does in one process.

    Rank 0 reads the text, adds up losses and writes the reports; the others compute their part of the model.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
        process: This process among the ranks.
    Returns:
        The contents of report.json on rank 0, None on the others.
    Raises:
        InputError, MachineError: see `evaluate_checkpoint`; raised on every rank.
        ReportNotWritten: raised on rank 0.
    """
    device, groups = start(process), make_groups(evaluation_layout(request))
    opened = open_on_all_ranks(checkpoint, kinds=("weight",), world=groups.world)
    begun: list[_Begun] = []  # on rank 0: a text is not sent
    report = None
    with ExitStack() as stack:
        broadcast_from_first(lambda: begun.append(_begin(opened, request, until=stack)), group=groups.world)
        model = load_distributed(opened, groups=groups, device=device, precision=request.precision)
        if begun:
            with model.served():
                report = begun[0].measure_with(model)
        else:
            ignore_stop_signals()  # rank 0 answers them, and the others are ended with it
            model.serve()
    stop()  # not after an error: other ranks may wait in a collective, and are ended only once this one has ended
    return report


class _EvaluatedModel(Scorer, Protocol):
    """A checkpoint's model, in one process or on ranks.

    Attributes:
        certificate: The certificate of its positions, as plain values.
        windows: Counts the scores that its attention computes; None if nothing counts them.
    """

    certificate: dict[str, Any]
    windows: LosslessWindows | None


@dataclass(frozen=True)
class _Begun:
    """An evaluation that lacks only the model."""

    opened: Checkpoint
    folder: Path
    text: EvaluationText
    plan: EvaluationPlan
    tracker: MlflowTracker | None
    provenance: Provenance

    def measure_with(self, model: _EvaluatedModel, *, blocks: Sequence[AttentionBlock] = ()) -> dict[str, Any]:
        """Measure, write the reports and return the contents of report.json.

        Args:
            model: The model.
            blocks: Its blocks, in order, if they are all in this process.
        """
        evaluated, name = evaluated_model(self.opened, model.certificate), _name(self.opened)
        if self.text.begins is not None:
            evaluated = replace(evaluated, attention=f"{evaluated.attention}, documents masked")
        build = partial(build_report, model=evaluated, text=self.text, provenance=self.provenance)
        return run_evaluation(
            model,
            self.text,
            self.plan,
            record=EvaluationRecord(build, self.folder, name),
            parts=PartialResults(self.folder / name, evaluated, self.provenance),
            tracker=self.tracker,
            attention=model.windows,
            blocks=blocks,
        )


def _begin(opened: Checkpoint, request: EvaluationRequest, *, until: ExitStack) -> _Begun:
    """Read the text, decide what to measure, and refuse what no model is needed for.

    Args:
        opened: The checkpoint.
        request: What to measure.
        until: Its end closes the tracker, and lets go of the run folder.
    Raises:
        InputError, MachineError: see `evaluate_checkpoint`.
    """
    until.enter_context(in_use(opened.path.parent))
    folder = evaluation_folder(opened.run_dir)
    text = held_out_text(opened) if request.data is None else file_text(opened, request.data)
    plan = plan_evaluation(request, config=opened.config, tokens=len(text.tokens))
    check_evaluation_folder(folder, name=_name(opened))
    # Attach now: the tracker's thread imports mlflow while the model runs.
    track = opened.config.track
    tracker = until.enter_context(attached(opened.run_dir, uri=track.uri, offline=track.offline))
    provenance = provenance_of(opened, text.tokens, data=request.data, command=request.command, begins=text.begins)
    return _Begun(opened, folder, text, plan, tracker, provenance)


def _name(opened: Checkpoint) -> str:
    """Return the name of a checkpoint's folder: not the name that was given, which may be a link."""
    return opened.path.resolve().name


def plan_evaluation(request: EvaluationRequest, *, config: RunConfig, tokens: int) -> EvaluationPlan:
    """Return what a request asks to measure on a text of `tokens` tokens.

    Raises:
        InputError: a length, a protocol or the scale is wrong.
    """
    protocols = [parse_protocol(name) for name in request.protocols or config.evaluate.protocols]
    lengths = request.lengths or config.evaluation_lengths
    scale = None if request.scale is None else scale_for(request.scale, config.model)
    measurements = plan_measurements(lengths, protocols, tokens=tokens, on_same_tokens=request.same_tokens)
    return EvaluationPlan(
        measurements=[replace(each, scale=scale) for each in measurements],
        context=plan_context(tokens, longest=max(lengths)) if request.context else None,
        scale=scale,
    )


def run_evaluation(
    scorer: Scorer,
    text: EvaluationText,
    plan: EvaluationPlan,
    *,
    record: EvaluationRecord,
    parts: PartialResults,
    tracker: MlflowTracker | None,
    attention: LosslessWindows | None,
    blocks: Sequence[AttentionBlock] = (),
) -> dict[str, Any]:
    """Measure what is planned, write the reports and return the contents of report.json.

    Args:
        scorer: The model.
        text: The text.
        plan: What to measure.
        record: Keeps the results.
        parts: What an interrupted evaluation has left, and what this one would leave.
        tracker: Attached to the MLflow run of the training.
        attention: Counts the scores that the model's attention computes; None if nothing counts them.
        blocks: The model's blocks, in order; none if they are not in this process.
    Raises:
        TrainshortError: see `measure_loss` and `ReportNotWritten`.
    """
    try:
        _measure(scorer, text, plan, record=record, parts=parts, attention=attention)
        if blocks and record.context is not None and text.begins is None:
            longest = record.context["longest"]
            record.context["attention"] = measure_weights(scorer, blocks, text.tokens, longest=longest)
    except BaseException as error:  # Ctrl-C too
        record.keep_finished(of=plan.count, error=error, tracker=tracker)
        raise
    logger.info("report: %s", record.keep(tracker=tracker))
    parts.discard()
    return record.report


def _measure(
    scorer: Scorer,
    text: EvaluationText,
    plan: EvaluationPlan,
    *,
    record: EvaluationRecord,
    parts: PartialResults,
    attention: LosslessWindows | None,
) -> None:
    """Make the measurements and then, if it is planned, those of the context; show progress."""
    units = units_of(text.documents, tokens=len(text.tokens))
    points = () if plan.context is None else plan.context.points
    begun = [parts.begin(each.windows, units, variant=each.variant, attention=attention) for each in plan.measurements]
    begun_points = [parts.begin(each.windows, units, variant=each.name) for each in points]
    all_sums = (*begun, *begun_points)
    parts.tell(all_sums)
    # Count inputs, not windows: a long window takes longer.
    left = sum((sums.windows.count - sums.done) * sums.windows.length for sums in all_sums)
    with EvaluationProgress(inputs=left, measurements=plan.count) as progress:
        run_measurements(
            scorer,
            text,
            [*zip(plan.measurements, begun, strict=True)],
            units=units,
            results=record.results,
            write=record.keep,
            progress=progress,
            parts=parts,
        )
        if plan.context is not None:
            progress.begin("context")
            record.context = run_context(
                scorer,
                text.tokens,
                plan.context,
                begun=begun_points,
                units=units,
                batch_tokens=scorer.batch_tokens,
                progress=progress.advance,
                parts=parts,
                begins=text.begins,
            )
            progress.finish(f"effective context {record.context['effective_context']:,}")
