"""Commands on a run file: check, prepare, train."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import InputError
from launch.commands.options import AsJson, Overrides, RunFile, count_option

if TYPE_CHECKING:
    from configs.schema import RunConfig

RECORD_SECONDS = 30

run_commands = typer.Typer()


@run_commands.command("check")
def check_command(run: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate a run file and report all of its problems at once."""
    from configs.load import load_run
    from launch.show.console import show_json
    from launch.show.run import run_summary, show_summary

    config = load_run(run, overrides=overrides or [])
    model = Path(config.data.tokenizer) if config.data.tokenizer else None
    if model is not None and model.is_file():  # whether it exists is for `prepare`
        from data_pipeline.prepare import check_tokenizer

        check_tokenizer(config.data)
    if as_json:
        show_json(run_summary(config))
    else:
        show_summary(config)


@run_commands.command("prepare")
def prepare_command(run: RunFile, overrides: Overrides = None) -> None:
    """Turn the sources into a tokenizer and training data; parts that are done are skipped."""
    from configs.load import load_run
    from configs.paths import check_run_folder, data_folder

    config = load_run(run, overrides=overrides or [])
    check_run_folder(config)  # before the slow imports below

    from data_pipeline.prepare import prepare_data
    from launch.show.run import show_prepared

    show_prepared(prepare_data(config.data, folder=data_folder(config), progress=True))


@run_commands.command("train")
def train_command(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        count_option("--ranks", "Local ranks to start.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
    accept_change: Annotated[
        bool, typer.Option("--accept-change", help="Resume even if the model or the data has changed.")
    ] = False,
) -> None:
    """Train, resuming from the newest checkpoint; start local ranks, or join those of srun or torchrun."""
    from configs.load import load_run
    from launch.failure import ending_at_once
    from parallel.start import find_process_rank, hold_stop_signals

    config = load_run(run, overrides=overrides or [])
    process_rank = find_process_rank(os.environ)
    if process_rank is None:
        options = ["--accept-change"] if accept_change else []
        raise SystemExit(_start_local_ranks(config, run=run, overrides=overrides or [], ranks=ranks, options=options))
    if ranks is not None:
        raise InputError(
            f"--ranks {ranks} starts local ranks, but this is rank {process_rank.rank} of {process_rank.world_size} "
            f"already: leave --ranks out under {process_rank.starter}"
        )

    # The import below takes seconds. A SIGTERM meanwhile must wait until the rank can save.
    hold_stop_signals()
    with ending_at_once():
        from training.run import train_rank

        train_rank(config, process_rank, accept_change=accept_change)


def _start_local_ranks(
    config: "RunConfig", *, run: str, overrides: list[str], ranks: int | None, options: list[str]
) -> int:
    """Check all that can be checked before a process starts, then start the ranks and return their exit code.

    Args:
        config: The run, overrides applied.
        run: The run file as the user gave it, for the command lines of the ranks.
        overrides: Values of `--set`, likewise.
        ranks: Value of `--ranks`.
        options: Further options of `train` that are passed on to the ranks.
    """
    from configs.paths import logs_folder
    from launch.local import STOPPED_BY_HAND, start_ranks
    from launch.machine import gpu_count
    from launch.show.console import show_lines
    from training.export.formats.table import export_problems
    from training.incarnation import refuse_second_start, sole_launcher
    from training.preflight import make_ready

    gpus = gpu_count(os.environ)
    ranks = ranks or gpus or config.parallel.tensor * config.parallel.pipeline
    if 0 < gpus < ranks:
        raise InputError(
            f"--ranks {ranks} is more than this machine's GPUs ({gpus}): start {gpus} or fewer, "
            'or set CUDA_VISIBLE_DEVICES="" for CPU ranks'
        )
    ready = make_ready(config, world_size=ranks, device="cuda" if gpus else "cpu")
    if ready.finished:
        show_lines(f"{ready.run_dir} is trained to its last step, {config.train.steps}: raise train.steps to continue")
        return 0
    if ready.newest is None:  # said before training, not after it
        show_lines(*export_problems(config.model).values())
    refuse_second_start(ready.run_dir)
    sets = [argument for override in overrides for argument in ("--set", override)]
    # -P keeps the working directory off sys.path: the user may have a folder called training or configs there.
    command = [sys.executable, "-P", "-m", "trainshort", "train", *options, *sets, "--", run]
    with sole_launcher(ready.run_dir):
        code = start_ranks(command, ranks=ranks, logs=logs_folder(ready.run_dir), environment=os.environ)
        if code:
            _end_tracking(ready.run_dir, uri=config.track.uri, stopped=code == STOPPED_BY_HAND)
        return code


def _end_tracking(run_dir: Path, *, uri: str | None, stopped: bool) -> None:
    """End the MLflow run if rank 0 was killed before it could: the run would be shown as running for ever."""
    from training.incarnation import died_here
    from training.tracking.record import read_record
    from training.tracking.tracker import attach

    record = read_record(run_dir)
    tracker = attach(run_dir, uri=uri) if record and record.is_open and died_here(run_dir) else None
    if tracker:
        tracker.finish("KILLED" if stopped else "FAILED", wait_seconds=RECORD_SECONDS)
