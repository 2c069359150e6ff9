"""Standard suites of tasks: harness."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from configs.precisions import DEFAULT_PRECISION, require_precision
from launch.commands.model import PrecisionName
from launch.commands.options import AsJson, CheckpointPath, count_option, number_option, path_of
from training.out_of_memory import explain_out_of_memory

harness_commands = typer.Typer()

# What the libraries read when they are imported. Whoever sets one has decided.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@harness_commands.command("harness")
@explain_out_of_memory("a smaller --max-length")
def harness_command(
    checkpoint: CheckpointPath,
    tasks: Annotated[
        str, typer.Option(metavar="TASK,TASK", help="Names of tasks, groups or tags, with commas between.")
    ],
    task_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=path_of, help="A folder with tasks of your own, as YAML files."),
    ] = None,
    limit: Annotated[int | None, count_option("--limit", "Take the first N questions of each task.")] = None,
    fewshot: Annotated[
        int | None,
        number_option("--fewshot", "N", "Examples before each question.  [default: what the task says]", is_whole=True),
    ] = None,
    max_length: Annotated[
        int | None,
        count_option(
            "--max-length",
            "Tokens of a model's input at most.  [default: the longest text measured to be usable, else the training "
            "length]",
        ),
    ] = None,
    precision: PrecisionName = DEFAULT_PRECISION,
    as_json: AsJson = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness, such as lambada_openai; it must be installed."""
    from launch.show.console import show_json
    from launch.show.harness import show_results
    from training.checkpoint.manifest import require_checkpoint
    from training.harness.tasks import require_harness

    names = [name for name in (word.strip() for word in tasks.split(",")) if name]
    if not names:
        raise InputError(f"--tasks must name tasks, got {tasks!r}: write --tasks lambada_openai,piqa")
    if fewshot is not None and fewshot < 0:
        raise InputError(f"--fewshot must be 0 or more, got {fewshot}: 0 gives no examples")
    require_precision(precision)
    require_harness()
    require_checkpoint(checkpoint)  # before the slow imports

    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from training.evaluation.folder import ReportNotWritten
    from training.harness.run import run_harness

    show = show_json if as_json else show_results
    try:
        report = run_harness(
            checkpoint,
            tasks=list(dict.fromkeys(names)),
            folder=task_dir,
            limit=limit,
            fewshot=fewshot,
            max_length=max_length,
            precision=precision,
            command=shlex.join(["trainshort", *sys.argv[1:]]),
        )
    except ReportNotWritten as error:
        show(error.report)
        raise
    show(report)
