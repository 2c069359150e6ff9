"""The command that asks a trained model for what it has read: passkeys and needles."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from configs.commands import typed_command
from configs.precisions import DEFAULT_PRECISION
from configs.slow_parts import importing
from launch.commands.model import PrecisionName, ScaleName
from launch.commands.options import AsJson, CheckpointPath, count_option, number_option, path_of
from launch.complete import complete_tasks
from training.out_of_memory import explain_out_of_memory
from training.retrieval.tasks import DEFAULT_DEPTHS, DEFAULT_LENGTHS, DEFAULT_SAMPLES, DEFAULT_SEED, TASKS

retrieval_commands = typer.Typer()


@retrieval_commands.command("retrieval")
@explain_out_of_memory("shorter --lengths")
def retrieval_command(
    checkpoint: CheckpointPath,
    tasks: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", autocompletion=complete_tasks, help="What to ask for.")
    ] = ",".join(TASKS),
    lengths: Annotated[
        str, typer.Option(metavar="L,L,...", help="Lengths in tokens, or in training lengths as in 2x.")
    ] = ",".join(DEFAULT_LENGTHS),
    depths: Annotated[
        int, count_option("--depths", "Depths of the needle, from the beginning to the end.")
    ] = DEFAULT_DEPTHS,
    samples: Annotated[int, count_option("--samples", "Prompts of each task, length and depth.")] = DEFAULT_SAMPLES,
    seed: Annotated[int, number_option("--seed", "N", "Seed of the prompts.", is_whole=True)] = DEFAULT_SEED,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=path_of, help="Text of the haystack.  [default: the run's held-out text]"),
    ] = None,
    scale: ScaleName = None,
    precision: PrecisionName = DEFAULT_PRECISION,
    as_json: AsJson = False,
) -> None:
    """Hide numbers in a text and ask for them: passkeys and needles by depth and length, also past the trained one."""
    from launch.show.console import show_json
    from launch.show.retrieval import show_retrieval
    from training.retrieval.request import RetrievalRequest, check_retrieval

    request = RetrievalRequest(
        tasks=[name.strip() for name in tasks.split(",")],
        lengths=[length.strip() for length in lengths.split(",")],
        depths=depths,
        samples=samples,
        seed=seed,
        data=data,
        scale=scale,
        precision=precision,
        command=typed_command(),
    )
    check_retrieval(checkpoint, request)  # before the slow imports

    from launch.evaluation import show_when_done

    with importing():
        from training.retrieval.run import measure_retrieval

    show = show_json if as_json else partial(show_retrieval, checkpoint=checkpoint)
    show_when_done(lambda: measure_retrieval(checkpoint, request), show=show)
