"""Models for other programs, and from them: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from configs.slow_parts import importing
from launch.commands.options import CheckpointPath, count_option, path_of
from launch.complete import complete_dtypes, complete_formats
from parallel.start import interrupt_on_sigterm
from training.export.formats.table import DTYPES, FORMATS
from training.out_of_memory import explain_out_of_memory

exchange_commands = typer.Typer()

FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        autocompletion=complete_formats,
        help=" ".join(f"{name}: {row.description}." for name, row in FORMATS.items()),
    ),
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(DTYPES),
        autocompletion=complete_dtypes,
        help="Type of the weights. "
        + " ".join(f"{name}: {', '.join(row.dtypes)}." for name, row in FORMATS.items())
        + "  [default: the first]",
    ),
]
WithCode = Annotated[
    bool,
    typer.Option(
        "--with-code",
        help="hf: carry the modelling code, for any model, faster and right in 16 bits; loaded with "
        "trust_remote_code=True.",
    ),
]
ServeCheck = Annotated[
    bool,
    typer.Option(
        "--serve-check", help="Serve it on this machine (hf: vLLM; gguf: llama.cpp) and compare its text too."
    ),
]
Register = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="hf: also add it to MLflow's Model Registry, as a new version of this name.",
    ),
]


@exchange_commands.command("export")
@explain_out_of_memory()
def export_command(
    checkpoint: CheckpointPath,
    format_name: FormatName,
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=path_of, help="A new or empty folder, also a link or a mount.")
    ],
    dtype: DtypeName = None,
    with_code: WithCode = False,
    serve_check: ServeCheck = False,
    register: Register = None,
) -> None:
    """Write the model for inference engines, and compare its logits and text with the trained model's."""
    interrupt_on_sigterm()  # a temporary folder as large as the model must not be left
    from training.checkpoint.manifest import require_checkpoint
    from training.export.folder import try_new_folder
    from training.export.formats.table import require_format, require_registrable, server_of
    from training.tracking.registry import require_model_name

    # a wrong word or path is answered before the slow imports
    require_format(format_name, dtype=dtype, with_code=with_code)
    if serve_check:
        server_of(format_name, with_code=with_code)
    if register is not None:
        require_registrable(format_name)
        require_model_name(register)
    try_new_folder(out)
    require_checkpoint(checkpoint)

    from launch.show.model import show_export

    with importing():
        from training.export.run import export_checkpoint

    exported = export_checkpoint(
        checkpoint,
        format=format_name,
        out=out,
        dtype=dtype,
        with_code=with_code,
        serve_check=serve_check,
        register=register,
    )
    show_export(exported, checkpoint=checkpoint)


@exchange_commands.command("import")
@explain_out_of_memory()
def import_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="HF_DIR", parser=path_of, help="A folder with a BLOOM, MPT or Jais model of Hugging Face."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", parser=path_of, help="The run folder to make, new or empty.")],
    length: Annotated[
        int | None,
        count_option("--length", "Tokens that the model was trained at.  [default: what its config.json says]"),
    ] = None,
) -> None:
    """Make a checkpoint of a Hugging Face model, to evaluate, generate, export or train on in any layout."""
    interrupt_on_sigterm()  # a temporary folder as large as the model must not be left
    from training.export.folder import try_new_folder
    from training.export.hf_model import read_model

    # answered before the slow imports
    try_new_folder(out)
    read_model(source)

    from launch.show.model import show_import
    from training.export.import_hf import import_model

    show_import(import_model(source, out=out, train_length=length), out=out)
