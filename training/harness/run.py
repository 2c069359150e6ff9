"""`trainshort harness`: run tasks of EleutherAI's lm-evaluation-harness on a checkpoint."""

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from configs.files import in_use
from configs.paths import evaluation_folder
from data_pipeline.tokenizer import load_tokenizer
from training.checkpoint.manifest import model_sha256
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.folder import check_evaluation_folder
from training.evaluation.provenance import evaluation_date, product_versions
from training.evaluation.usable import find_held_out_report, usable_length
from training.harness.kept import HARNESS_FOLDER
from training.harness.language_model import CheckpointLM
from training.harness.record import keep_results
from training.harness.report import result_rows
from training.harness.tasks import TaskRequest, load_tasks
from training.model.single import inference_device, load_single
from training.tracking.spool import now_ms
from training.tracking.tracker import attached

logger = logging.getLogger(__name__)

_SEED = 1


def run_harness(
    path: Path,
    *,
    request: TaskRequest,
    max_length: int | None,
    precision: str,
    command: str | None,
) -> dict[str, Any]:
    """Run tasks on a checkpoint; keep the results in its folder of RUN_DIR/evaluation, and in MLflow.

    Args:
        path: A step folder, or a run folder for its newest checkpoint.
        request: The tasks.
        max_length: Inputs of the model at most; None for `longest_input`.
        precision: Value of `--precision`.
        command: The command line, to be named in the report.
    Returns:
        What was measured now: the contents of results.json without earlier results.
    Raises:
        InputError: the checkpoint, a task, its data or a length is wrong, or no task gives a number.
        MachineError: a package is missing, or RUN_DIR/evaluation cannot be written.
        ReportNotWritten: the disk has become full since; the error holds the report.
    """
    inference_device(precision)
    checkpoint = open_checkpoint(path)
    kept = evaluation_folder(checkpoint.run_dir) / checkpoint.path.resolve().name
    loaded = load_tasks(request)
    check_evaluation_folder(kept, name=HARNESS_FOLDER)
    longest = max_length or longest_input(checkpoint)
    date, versions, began_ms = evaluation_date(), product_versions("lm_eval"), now_ms()
    track = checkpoint.config.track
    # Attach now: the tracker's thread imports mlflow while the model runs.
    with in_use(checkpoint.path.parent), attached(checkpoint.run_dir, uri=track.uri, offline=track.offline) as tracker:
        single, tokenizer = load_single(checkpoint, precision=precision), load_tokenizer(checkpoint.tokenizer)
        model = CheckpointLM(single, tokenizer, max_length=longest, seed=_SEED)
        results = _evaluate(model, loaded, limit=request.limit)
        if model.cut:
            logger.warning("%d contexts are longer than %d tokens and were cut at their beginning", model.cut, longest)
        facts = {"limit": request.limit, "max_length": longest, "precision": precision, "date": date}
        report = {
            "checkpoint": str(checkpoint.path.absolute()),
            "step": checkpoint.step,
            "train_length": checkpoint.train_length,
            "weights_sha256": model_sha256(checkpoint.manifest),
            "evaluations": [{"date": date, "command": command, "versions": versions, "cut": model.cut}],
            "results": result_rows(results, **facts),
        }
        logger.info("report: %s", keep_results(report, kept, tracker=tracker, began_ms=began_ms))
    return report


def longest_input(checkpoint: Checkpoint) -> int:
    """Return the inputs that a checkpoint's model is given at most: positions have no limit, but quality may.

    It is the longest text that was measured to be usable, which an export names too; without a measurement, the
    training length.
    """
    report = find_held_out_report(checkpoint.path, step=checkpoint.step, sha256=model_sha256(checkpoint.manifest))
    return max(checkpoint.train_length, usable_length(report.contents) if report else 0)


def _evaluate(model: CheckpointLM, loaded: Any, *, limit: int | None) -> Mapping[str, Any]:
    # lm_eval prints how it estimates errors on standard output, which is for results
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluate(model, loaded, limit=limit, log_samples=False)
    assert results is not None, "this is rank 0"
    return dict(results)
