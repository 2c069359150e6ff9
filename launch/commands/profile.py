"""The command that shows where a training step's time and memory go."""

import json
import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.commands import command_here, run_file_named
from configs.errors import InputError, MachineError
from configs.slow_parts import importing
from launch.commands.options import AsJson, Overrides, RunFile, count_option, path_of

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from parallel.start import ProcessRank

logger = logging.getLogger(__name__)

profile_commands = typer.Typer()


@profile_commands.command("profile")
def profile_command(
    run: RunFile,
    overrides: Overrides,
    steps: Annotated[int, count_option("--steps", "Steps to time, then the same number to profile.")] = 3,
    ranks: Annotated[
        int | None,
        count_option("--ranks", "Local ranks to start.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=path_of, help="Folder of the profile.  [default: RUN_DIR/profile]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a few training steps, and show where their time and memory go; the run is not touched."""
    from configs.load import load_run
    from configs.paths import run_folder
    from launch.failure import ending_at_once
    from launch.show.console import show_json
    from launch.show.profile import show_profile
    from parallel.start import find_process_rank

    config = load_run(run, overrides=overrides)
    process = find_process_rank(os.environ)
    folder = out or run_folder(config) / "profile"
    if process is None:
        if out is not None:
            _check_out(out)
        with run_file_named(run, overrides):
            code, document = _profile_local_ranks(config, ranks=ranks, steps=steps, out=folder)
        if code:
            raise SystemExit(code)
        show_json(document) if as_json else show_profile(document, out=folder)
    elif process.starter != "local":
        raise InputError(f"profile starts its own ranks on one machine: run it outside {process.starter}'s ranks")
    else:
        with ending_at_once():
            _profile_one_rank(config, process, steps=steps, out=folder)


def _check_out(out: Path) -> None:
    """Refuse a folder of somebody else's files, in which the trace and the logs of ranks would replace some.

    Raises:
        InputError: it is a file, holds something other than an earlier profile, or is among checkpoints.
        MachineError: it cannot be made or written.
    """
    from configs.files import try_folder
    from configs.paths import refuse_among_checkpoints
    from training.profiling.report import PROFILE_NAME

    refuse_among_checkpoints(out, name="--out")
    if out.is_file():
        raise InputError(f"--out {out} is a file, not a folder: name a new folder")
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / PROFILE_NAME).exists():
            raise InputError(f"--out {out} holds other files: name a new folder")
        try_folder(out)
    except OSError as error:
        raise MachineError(f"--out {out} cannot be written ({error.strerror}): name another folder") from None


def _profile_one_rank(config: "RunConfig", process: "ProcessRank", *, steps: int, out: Path) -> None:
    from configs.paths import logs_folder, rank_log
    from launch.machine import require_usable_gpus
    from launch.show.streams import following
    from parallel.start import open_gpu_early
    from training.rank_errors import explain_rank_failure

    log = None if process.rank else rank_log(logs_folder(out), rank=0)
    with following(log, descriptor=process.terminal, environ=os.environ), explain_rank_failure(config, process):
        with importing():
            open_gpu_early(process, tensor=config.parallel.tensor)
            from training.profiling.run import profile_rank

        require_usable_gpus(os.environ)
        profile_rank(config, process, steps=steps, out=out)


def _profile_local_ranks(
    config: "RunConfig", *, ranks: int | None, steps: int, out: Path
) -> tuple[int, dict[str, Any]]:
    """Check the run, start its ranks on a scratch run folder, and return their exit code and the report.

    Raises:
        InputError: the ranks, the machine or the data do not fit the run.
        MachineError: the folder of the trace cannot be written.
    """
    from configs.figures import counted
    from configs.load import dump_run
    from configs.paths import logs_folder, metrics_path
    from launch.local import make_log_folder, start_ranks
    from launch.show.train import verbosity_options
    from launch.start_check import check_start
    from training.profiling.report import PROFILE_NAME
    from training.rank_errors import rank_out_of_memory

    ready, device = check_start(_from_the_start(config, run_dir=out), ranks=ranks, environ=os.environ)
    make_log_folder(logs_folder(out))
    started = counted(ready.layout.world_size, "CPU rank" if device == "cpu" else "GPU rank")
    logger.info("profiling %s on %s: %s", config.run.name, started, ready.layout)
    with tempfile.TemporaryDirectory(prefix="trainshort-profile-") as scratch:
        file = Path(scratch) / "run.yaml"
        file.write_text(dump_run(_from_the_start(config, run_dir=Path(scratch))), encoding="utf-8")
        options = [*verbosity_options(), "--steps", str(steps), "--out", str(out)]
        code = start_ranks(
            command_here("profile", *options, "--", str(file)),
            ranks=ready.layout.world_size,
            logs=logs_folder(out),
            metrics=metrics_path(Path(scratch)),
            environ=os.environ,
            explain_memory=partial(rank_out_of_memory, config, ready.layout, on_gpu=False),
        )
    return code, {} if code else json.loads((out / PROFILE_NAME).read_text(encoding="utf-8"))


def _from_the_start(config: "RunConfig", *, run_dir: Path) -> "RunConfig":
    """Return the run in another folder, with its own data, and nothing to validate or to load."""
    from configs.paths import data_folder

    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(run_dir)}),
            "data": config.data.model_copy(update={"dir": str(data_folder(config))}),
            "train": config.train.model_copy(update={"init_from": None, "branch_from": None}),
            "evaluate": config.evaluate.model_copy(update={"every": 0}),
        }
    )
