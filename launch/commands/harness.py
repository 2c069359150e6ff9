"""Standard suites of tasks: harness."""

import os
from pathlib import Path
from typing import Annotated

import typer

from configs.commands import typed_command
from configs.precisions import DEFAULT_PRECISION, require_precision
from configs.slow_parts import importing
from launch.commands.model import PrecisionName
from launch.commands.options import AsJson, CheckpointPath, count_option, number_option, path_of
from training.out_of_memory import explain_out_of_memory

harness_commands = typer.Typer()

# Read by the libraries when they are imported; a user's own settings win.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

TaskNames = Annotated[
    str, typer.Option(metavar="TASK,TASK", help="Names of tasks, groups or tags, separated by commas.")
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", parser=path_of, help="A folder with tasks of your own, as YAML files."),
]
FewShot = Annotated[
    int | None,
    number_option("--fewshot", "N", "Examples before each question.  [default: what the task says]", is_whole=True),
]
MaxLength = Annotated[
    int | None,
    count_option(
        "--max-length",
        "Tokens of an input at most.  [default: the longest text measured to be usable, else the training length]",
    ),
]


@harness_commands.command("harness")
@explain_out_of_memory("a smaller --max-length")
def harness_command(
    checkpoint: CheckpointPath,
    tasks: TaskNames,
    task_dir: TaskFolder = None,
    limit: Annotated[int | None, count_option("--limit", "Take the first N questions of each task.")] = None,
    fewshot: FewShot = None,
    max_length: MaxLength = None,
    precision: PrecisionName = DEFAULT_PRECISION,
    as_json: AsJson = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness, such as lambada_openai; it must be installed."""
    from launch.show.console import show_json
    from launch.show.harness import show_results
    from training.checkpoint.manifest import require_checkpoint
    from training.harness.tasks import TaskRequest, require_harness

    names = dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip())
    request = TaskRequest(tuple(names), folder=task_dir, limit=limit, fewshot=fewshot)
    require_precision(precision)
    require_harness()
    require_checkpoint(checkpoint)  # before the slow imports

    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from training.evaluation.folder import ReportNotWritten

    with importing():
        from training.harness.run import run_harness

    show = show_json if as_json else show_results
    try:
        report = run_harness(
            checkpoint,
            request=request,
            max_length=max_length,
            precision=precision,
            command=typed_command(),
        )
    except ReportNotWritten as error:
        show(error.report)
        raise
    show(report)
