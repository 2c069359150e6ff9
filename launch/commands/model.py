"""Commands on a trained model: evaluate, generate, export."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import AsJson, CheckpointPath, Lengths, count_option, lengths_option, path_of
from training.export.formats.table import FORMATS

model_commands = typer.Typer()


@model_commands.command("evaluate")
def evaluate_command(
    checkpoint: CheckpointPath,
    lengths: Annotated[
        Lengths | None,
        lengths_option("--lengths", "Lengths in tokens.  [default: the run file's, else 1, 2, 4, 8 x trained]"),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="nonoverlapping or sliding:STRIDE; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=path_of, help="A text file.  [default: the run's held-out text]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity at each length; write the run's evaluation folder, by checkpoint and as the newest."""
    from launch.show.console import show_json
    from launch.show.model import show_report
    from training.evaluation.folder import ReportNotWritten
    from training.evaluation.run import evaluate_checkpoint

    show = show_json if as_json else show_report
    protocols = tuple(protocol) if protocol else None  # None: those of the run file
    try:
        report = evaluate_checkpoint(checkpoint, lengths=lengths, protocols=protocols, data=data)
    except ReportNotWritten as error:
        show(error.report)  # the work of minutes or hours
        raise
    show(report)


@model_commands.command("generate")
def generate_command(
    checkpoint: CheckpointPath,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue; empty for the start of a document.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=path_of,
            help="That text in a UTF-8 file; - for standard input. Its last line break is dropped.",
        ),
    ] = None,
    tokens: Annotated[int, count_option("--tokens", "New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens whose probabilities add up to this.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Continue a text, with a key-value cache; past the training length too."""
    from launch.show.model import show_generated
    from training.generation import Sampling, generate_from_checkpoint, read_prompt

    text = read_prompt(prompt, prompt_file)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    show_generated(generate_from_checkpoint(checkpoint, prompt=text, tokens=tokens, sampling=sampling), as_json=as_json)


@model_commands.command("export")
def export_command(
    checkpoint: CheckpointPath,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            help=" ".join(f"{name}: {description}." for name, description in FORMATS.items()),
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=path_of, help="A new or empty folder, also a link or a mount.")
    ],
) -> None:
    """Write the model for inference engines, and compare its logits with the trained model's."""
    from launch.show.console import show_lines
    from training.export.run import export_checkpoint

    show_lines(f"exported {export_checkpoint(checkpoint, format=format_name, out=out)}")
