"""`trainshort import`: a model from Hugging Face becomes a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import count_option, path_of
from training.out_of_memory import explain_out_of_memory

import_commands = typer.Typer()


@import_commands.command("import")
@explain_out_of_memory()
def import_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="HF_DIR", parser=path_of, help="A folder with a BLOOM or MPT model of Hugging Face."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", parser=path_of, help="The run folder to make, new or empty.")],
    length: Annotated[
        int | None,
        count_option("--length", "Tokens that the model was trained at.  [default: what its config.json says]"),
    ] = None,
) -> None:
    """Make a checkpoint of a Hugging Face model, to evaluate, generate, export or train on in any layout."""
    from training.export.folder import try_new_folder
    from training.export.hf_model import read_model

    # answered before the slow imports
    try_new_folder(out)
    read_model(source)

    from launch.show.model import show_import
    from training.export.import_hf import import_model

    show_import(import_model(source, out=out, train_length=length), out=out)
