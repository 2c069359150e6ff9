"""Commands on this machine: doctor."""

from typing import Annotated

import typer

from configs.errors import InputError
from launch.commands.options import AsJson, Overrides
from launch.complete import complete_run_files

machine_commands = typer.Typer()

AuditedRun = Annotated[
    str | None,
    typer.Option(
        metavar="RUN.yaml",
        autocompletion=complete_run_files,
        help="Audit how exact this run's ALiBi is here, at its lengths; of a run folder or a checkpoint, also show "
        "the windows of its weights.",
    ),
]


@machine_commands.command("doctor")
def doctor_command(
    alibi: AuditedRun = None,
    *,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Report what this machine can do; with --alibi, compare a run's attention with exact ALiBi."""
    from launch.show.console import show_json

    if alibi is None:
        if overrides:
            raise InputError(f"--set {overrides[0]} changes a run file, and none is given: add --alibi RUN.yaml")
        from launch.doctor import machine_report
        from launch.show.machine import show_machine

        machine = machine_report()
        if as_json:
            show_json(machine)
        else:
            show_machine(machine)
        return

    from configs.load import load_run, shipped_runs
    from configs.path_text import expand_path
    from training.checkpoint.manifest import CONFIG_NAME, require_checkpoint

    folder = None if alibi in shipped_runs() else expand_path(alibi)
    checkpoint = require_checkpoint(folder) if folder is not None and folder.is_dir() else None
    config = load_run(str(checkpoint / CONFIG_NAME) if checkpoint else alibi, overrides=overrides)

    from launch.doctor import alibi_report, check_audit, weights_report
    from launch.show.machine import show_audit

    audit = alibi_report(config)
    if checkpoint is not None:
        lengths = [each["length"] for each in audit["lengths"]]
        audit["weights"] = weights_report(checkpoint, lengths=lengths, precision=audit["precision"])
    if as_json:
        show_json(audit)
    else:
        show_audit(audit)
    check_audit(audit)  # last: a failed audit is shown too
