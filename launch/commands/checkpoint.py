"""`trainshort checkpoint`: list, verify, reshape, average."""

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from launch.commands.options import AsJson, CheckpointPath, Overrides, count_option, path_of
from launch.complete import complete_checkpoints
from parallel.start import interrupt_on_sigterm

checkpoint_commands = typer.Typer(no_args_is_help=True, help="The checkpoints of a run.")


CheckpointsPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        parser=path_of,
        autocompletion=complete_checkpoints,
        help="A run folder for all of its checkpoints, or one checkpoint.",
    ),
]


@checkpoint_commands.command("list")
def checkpoint_list_command(folder: CheckpointsPath, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first, without reading their bytes."""
    from launch.show.checkpoint import show_checkpoints
    from launch.show.console import show_json
    from training.checkpoint.verify import list_verdicts

    verdicts = list_verdicts(folder)
    if as_json:
        show_json([verdict.to_json() for verdict in verdicts])
    else:
        show_checkpoints(verdicts, folder=folder)


@checkpoint_commands.command("verify")
def checkpoint_verify_command(folder: CheckpointsPath, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint, or of all in a run folder; exit with 2 if one is not whole."""
    from launch.show.checkpoint import show_verdicts
    from launch.show.console import show_json
    from training.checkpoint.verify import verify_checkpoints

    verdicts = verify_checkpoints(folder)
    if as_json:
        show_json([verdict.to_json() for verdict in verdicts])
    else:
        show_verdicts(verdicts)
    if any(verdict.problems for verdict in verdicts):  # after the output, which names the broken ones
        raise SystemExit(InputError.exit_code)


@checkpoint_commands.command("reshape")
def checkpoint_reshape_command(
    checkpoint: CheckpointPath,
    overrides: Overrides,
    ranks: Annotated[int | None, count_option("--ranks", "Number of ranks.  [default: tensor x pipeline]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show how each tensor would be split.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what another layout reads of a checkpoint. Nothing needs converting: any layout resumes from it."""
    from configs.saved import typed_run
    from launch.show.console import show_json, show_lines
    from training.checkpoint.manifest import find_checkpoint

    if not dry_run:
        for option, is_given in (("--set", overrides), ("--ranks", ranks), ("--json", as_json)):
            if is_given:
                raise InputError(f"{option} is for --dry-run: add --dry-run, or leave {option} out")
        from training.preflight import is_weights_only  # here: it imports numpy

        folder, manifest = find_checkpoint(checkpoint)
        start = f"start it there, as in `trainshort train {typed_run(folder.parents[1])} --set parallel.tensor=4`"
        if is_weights_only(manifest):
            start = f"this one has no optimizer state, so start one in any layout with train.init_from: {folder}"
        show_lines(
            f"nothing has to be done: a run resumes from any checkpoint in any layout; {start}, or see what is read "
            "with --dry-run"
        )
        return

    from launch.show.checkpoint import show_reshape
    from training.checkpoint.reshape import plan_reshape

    plan = plan_reshape(checkpoint, overrides=overrides, ranks=ranks)
    if as_json:
        show_json(plan.to_json())
    else:
        show_reshape(plan)


@checkpoint_commands.command("average")
def checkpoint_average_command(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT",
            parser=path_of,
            autocompletion=complete_checkpoints,
            help="Two checkpoints or more, or one run folder for its newest ones.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", parser=path_of, help="The run folder to make, new or empty.")],
    last: Annotated[
        int | None,
        count_option("--last", "How many of a run folder's checkpoints.  [default: 5, or as many as there are]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of the mean of several checkpoints' weights, to evaluate, generate, export or train on."""
    interrupt_on_sigterm()  # a temporary folder as large as the model must not be left
    from training.averaging.chosen import choose_checkpoints
    from training.export.folder import try_new_folder

    # answered before the slow imports
    try_new_folder(out)
    choose_checkpoints(checkpoints, last=last)

    from launch.show.checkpoint import show_average
    from launch.show.console import show_json
    from training.averaging.average import average_checkpoints

    result = average_checkpoints(checkpoints, out=out, last=last)
    if as_json:
        show_json(result.to_json())
    else:
        show_average(result, out=out)
