"""`trainshort evaluate` on ranks: start them on this machine, or be one of them; and show the report."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from configs.commands import command_here
from configs.figures import counted
from configs.paths import logs_folder, metrics_path, rank_log
from configs.slow_parts import importing
from launch.failure import end_process, ending_at_once
from launch.machine import device_type, require_usable_gpus
from launch.show.streams import following
from parallel.start import ProcessRank, interrupt_on_sigterm
from training.checkpoint.manifest import require_checkpoint
from training.evaluation.precheck import evaluation_layout
from training.evaluation.request import EvaluationRequest
from training.rank_errors import evaluation_out_of_memory, explain_failure_of

logger = logging.getLogger(__name__)

Show = Callable[[dict[str, Any]], None]


def show_when_done(evaluate: Callable[[], dict[str, Any] | None], *, show: Show) -> None:
    """Evaluate, and show the report even if it cannot be written: it took minutes or hours.

    Args:
        evaluate: Returns the report; None on all ranks but the first.
        show: Shows it.
    Raises:
        ReportNotWritten: the report cannot be written.
    """
    from training.evaluation.folder import ReportNotWritten

    try:
        report = evaluate()
    except ReportNotWritten as error:
        show(error.report)
        raise
    if report is not None:
        show(report)


def start_evaluation(checkpoint: Path, request: EvaluationRequest) -> int:
    """Start an evaluation's ranks on this machine, and return their exit code; rank 0 shows the report.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
    """
    from launch.local import start_ranks

    layout, run_dir = evaluation_layout(request), _run_dir(checkpoint)
    ranks = counted(layout.world_size, "CPU rank" if device_type(os.environ) == "cpu" else "GPU rank")
    logger.info("evaluating on %s: tensor %d x pipeline %d", ranks, layout.tensor, layout.pipeline)
    return start_ranks(
        command_here(*sys.argv[1:]),
        ranks=layout.world_size,
        logs=_logs(run_dir),
        metrics=metrics_path(run_dir),
        environ=os.environ,
        explain_memory=partial(evaluation_out_of_memory, layout, on_gpu=False),
        results=sys.stdout,
    )


def evaluate_one_rank(checkpoint: Path, request: EvaluationRequest, process: ProcessRank, *, show: Show) -> None:
    """Evaluate on one of the ranks; rank 0 shows the report.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
        process: This process among the ranks.
        show: Shows the report.
    """
    layout = evaluation_layout(request)
    is_logged = process.rank == 0 and process.starter == "local"
    log = rank_log(_logs(_run_dir(checkpoint)), rank=0) if is_logged else None

    def explain(rank: int, how: str, on_gpu: bool) -> str:
        return evaluation_out_of_memory(layout, rank, how, on_gpu=on_gpu)

    with (
        ending_at_once(),
        following(log, descriptor=process.terminal, environ=os.environ),
        explain_failure_of(process, explain=explain),
    ):
        if process.rank == 0:
            interrupt_on_sigterm()
        with importing():
            from training.evaluation.run import evaluate_rank

        require_usable_gpus(os.environ)
        show_when_done(partial(evaluate_rank, checkpoint, request, process), show=show)
    # All is written and said. gloo has been seen to abort while the interpreter was torn down, and SLURM then calls the
    # job failed.
    end_process(0)


def _run_dir(checkpoint: Path) -> Path:
    return require_checkpoint(checkpoint).parent.parent


def _logs(run_dir: Path) -> Path:
    """Return the folder of the ranks' logs: those of training are the run's."""
    return logs_folder(run_dir) / "evaluate"
