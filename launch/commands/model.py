"""Commands on a trained model: evaluate, compare, report, generate."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.commands import typed_command
from configs.errors import InputError
from configs.precisions import DEFAULT_PRECISION, PRECISIONS, require_precision
from configs.protocols import PROTOCOL_NAMES
from configs.scales import SCALES
from configs.slow_parts import importing
from launch.commands.options import (
    AsJson,
    CheckpointPath,
    Lengths,
    count_option,
    lengths_option,
    number_option,
    path_of,
)
from launch.complete import (
    complete_checkpoints,
    complete_precisions,
    complete_protocols,
    complete_scales,
)
from training.out_of_memory import explain_out_of_memory

if TYPE_CHECKING:
    from training.evaluation.request import EvaluationRequest

logger = logging.getLogger(__name__)

model_commands = typer.Typer()

PromptText = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text to continue; empty for the start of a document.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        parser=path_of,
        help="That text in a UTF-8 file; - for standard input. Its last line break is dropped.",
    ),
]
Temperature = Annotated[
    float | None,
    number_option("--temperature", "T", "0 takes the likeliest token; higher is more varied.  [default: 0.8]"),
]
TopP = Annotated[
    float | None,
    number_option(
        "--top-p", "P", "Draw from the likeliest tokens whose probabilities add up to this.  [default: 0.95]"
    ),
]
DrawSeed = Annotated[
    int | None,
    number_option("--seed", "N", "Seed of the draws.  [default: a random one, which is printed]", is_whole=True),
]

ComparedRuns = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN_DIR",
        parser=path_of,
        autocompletion=complete_checkpoints,
        help="Run folders, or checkpoints in them.",
    ),
]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="|".join(PRECISIONS),
        autocompletion=complete_precisions,
        help="What to compute in, whatever the model trained in; tf32 needs a GPU.",
    ),
]

EvaluationLengths = Annotated[
    Lengths | None,
    lengths_option("--lengths", "Lengths in tokens.  [default: the run file's, else 1, 2, 4, 8 x trained]"),
]
ProtocolNames = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", autocompletion=complete_protocols, help=f"{PROTOCOL_NAMES}; may be repeated."),
]
EvaluationFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", parser=path_of, help="A file of text or records.  [default: the run's held-out text]"),
]
SameTokensFlag = Annotated[
    bool, typer.Option("--same-tokens", help="Score the same tokens at each length of a protocol.")
]

ContextFlag = Annotated[bool, typer.Option("--context", help="Also measure how much of the context is used.")]

EvaluationTensor = Annotated[
    int | None, count_option("--tensor", "Ranks that share each layer.  [default: evaluate.tensor of the run file]")
]
EvaluationPipeline = Annotated[
    int | None,
    count_option(
        "--pipeline",
        "Stages that share the layers; starts tensor x pipeline ranks.  [default: evaluate.pipeline]",
    ),
]

FixedScaleName = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar=f"{'|'.join(SCALES)}:FACTOR",
        autocompletion=complete_scales,
        help="Scale ALiBi or rotary positions for longer texts, by a factor, as in linear:4.",
    ),
]
ScaleName = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar=f"{'|'.join(SCALES)}[:FACTOR]",
        autocompletion=complete_scales,
        help="Scale ALiBi or rotary positions for longer texts, by a factor or by the length in training lengths.",
    ),
]

HuggingFaceFolder = Annotated[
    Path | None,
    typer.Option("--hf", metavar="DIR", parser=path_of, help="Measure this model of Hugging Face on the run's text."),
]


@model_commands.command("evaluate")
@explain_out_of_memory("shorter --lengths", "--tensor or --pipeline, which split the model over GPUs")
def evaluate_command(
    checkpoint: CheckpointPath,
    lengths: EvaluationLengths = None,
    protocol: ProtocolNames = None,
    data: EvaluationFile = None,
    same_tokens: SameTokensFlag = False,
    context: ContextFlag = False,
    scale: ScaleName = None,
    hf: HuggingFaceFolder = None,
    precision: PrecisionName = DEFAULT_PRECISION,
    tensor: EvaluationTensor = None,
    pipeline: EvaluationPipeline = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity at each length; keep the report in the run's evaluation folder, by checkpoint and text."""
    from launch.evaluation import evaluate_one_rank, show_when_done, start_evaluation
    from launch.machine import gpu_count
    from launch.show.console import show_json
    from launch.show.model import show_report
    from parallel.start import find_process_rank
    from training.evaluation.precheck import check_ranks, check_request, chosen_splits
    from training.evaluation.request import EvaluationRequest

    tensors, stages = chosen_splits(checkpoint, tensor=tensor, pipeline=pipeline, hf=hf)
    request = EvaluationRequest(
        lengths=lengths,
        protocols=tuple(protocol or ()) or None,  # None: those of the run file
        data=data,
        same_tokens=same_tokens,
        context=context,
        scale=scale,
        hf=hf,
        precision=precision,
        tensor=tensors,
        pipeline=stages,
        command=typed_command(),
    )
    check_request(checkpoint, request)  # before the slow imports
    place = find_process_rank(os.environ)
    check_ranks(checkpoint, request, started=None if place is None else place.world_size, gpus=gpu_count(os.environ))
    show = show_json if as_json else partial(show_report, checkpoint=hf or checkpoint)
    if tensors * stages > 1:
        if place is None:
            raise SystemExit(start_evaluation(checkpoint, request))
        evaluate_one_rank(checkpoint, request, place, show=show)
    else:
        show_when_done(partial(_evaluate, checkpoint, request), show=show)


def _evaluate(checkpoint: Path, request: "EvaluationRequest") -> dict[str, Any]:
    """Evaluate a checkpoint, or a model of Hugging Face in its place; return the report."""
    if request.hf is None:
        with importing():
            from training.evaluation.run import evaluate_checkpoint

        return evaluate_checkpoint(checkpoint, request)

    from training.export.hf_baseline import evaluate_folder

    return evaluate_folder(checkpoint, request.hf, request)


@model_commands.command("compare")
def compare_command(
    runs: ComparedRuns,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            parser=path_of,
            help="The plot; only a plot of this command is ever overwritten.  [default: comparison.png]",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare on this file of evaluate --data.  [default: the held-out text, else the newest report]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: losses, perplexity at each length, speed, the keys that differ; draw perplexity and loss."""
    from launch.show.comparison import show_comparison
    from launch.show.console import show_json
    from training.comparison.comparison import compare_runs

    comparison = compare_runs(runs, text=text)

    from training.comparison.plot import check_plot_file, draw_comparison

    plot = out or Path("comparison.png")
    check_plot_file(plot)
    if as_json:
        show_json(comparison.to_json())
    else:
        show_comparison(comparison)
    if draw_comparison(comparison, plot) is not None:
        logger.info("plot: %s", plot)


@model_commands.command("report")
def report_command(
    runs: ComparedRuns,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            parser=path_of,
            help="The page; only a page of this command is ever overwritten.  "
            "[default: RUN_DIR/report.html, of a checkpoint RUN_DIR/report-NAME.html, of several comparison.html]",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Show perplexities on this file of evaluate --data.  [default: the held-out text, else the newest]",
        ),
    ] = None,
) -> None:
    """Write a page on one run, or on several laid over each other: one HTML file that needs no network."""
    from training.comparison.comparison import compare_runs

    comparison = compare_runs(runs, text=text)

    from launch.show.page import check_page_file, default_page, write_page

    page = out or default_page(comparison)
    check_page_file(page)
    write_page(comparison, page)
    logger.info("page: %s", page)


@model_commands.command("generate")
@explain_out_of_memory("fewer --tokens", "a shorter prompt")
def generate_command(
    checkpoint: CheckpointPath,
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from standard input, a line each, until it ends.")
    ] = False,
    tokens: Annotated[int, count_option("--tokens", "New tokens at most.")] = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: DrawSeed = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token; draw nothing.")] = False,
    scale: FixedScaleName = None,
    precision: PrecisionName = DEFAULT_PRECISION,
    as_json: AsJson = False,
) -> None:
    """Continue a text, shown while it is generated; past the training length too."""
    from configs.load import load_run
    from configs.positions import fixed_scale_for
    from training.checkpoint.manifest import CONFIG_NAME, require_checkpoint
    from training.sampling import choose_sampling, read_prompt

    if greedy:
        _refuse_given(
            {"--temperature": temperature, "--top-p": top_p, "--seed": seed},
            "--greedy takes the likeliest token, so {} has no effect: drop one of them",
        )
    if interactive:
        _refuse_given(
            {"--prompt": prompt, "--prompt-file": prompt_file, "--json": as_json or None},
            "--interactive reads prompts from standard input and streams, so {} has no effect: drop one of them",
        )
    require_precision(precision)
    sampling = choose_sampling(temperature=0.0 if greedy else temperature, top_p=top_p, seed=seed)
    text = "" if interactive else read_prompt(prompt, prompt_file)
    folder = require_checkpoint(checkpoint)  # a wrong path is answered before the slow imports
    if scale is not None:
        fixed_scale_for(scale, load_run(str(folder / CONFIG_NAME)).model)

    with importing():
        from launch.show.generation import answer_prompts, show_generated, show_stream
        from training.api import load

    model = load(checkpoint, precision=precision, scale=scale)
    if interactive:
        answer_prompts(model, tokens=tokens, sampling=sampling)
        return
    show = show_generated if as_json else show_stream
    show(model.stream(text, tokens=tokens, **asdict(sampling)))


def _refuse_given(options: Mapping[str, object], problem: str) -> None:
    """Refuse the first option that is given; the problem has {} for it."""
    for name, value in options.items():
        if value is not None:
            given = name if value is True else f"{name} {value}"
            raise InputError(problem.format(given))
