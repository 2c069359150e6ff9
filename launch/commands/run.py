"""Commands on a run file: init, check, prepare, train."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.commands import (
    command_here,
    name_run_file,
    override_options,
    run_file_named,
    typed_command,
    typed_overrides,
    typed_path,
)
from configs.errors import InputError
from configs.secrets import hide_secrets
from launch.commands.options import AsJson, Overrides, RunFile, count_option, gigabytes_option, path_of
from launch.complete import complete_shipped_runs
from training.out_of_memory import explain_out_of_memory

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from parallel.start import ProcessRank
    from training.memory_fit import MemoryFit

RECORD_SECONDS = 30

logger = logging.getLogger(__name__)

run_commands = typer.Typer()


@run_commands.command("init")
def init_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; its folder will be runs/NAME.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="RUN",
            autocompletion=complete_shipped_runs,
            help="A shipped run: demo takes minutes on a CPU and comes with its text; alibi-125m is for 8 GPUs.",
        ),
    ] = "demo",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=path_of, help="The file to write.  [default: NAME.yaml]"),
    ] = None,
) -> None:
    """Write a run file of your own from a shipped one: every key with its meaning, to be edited."""
    from configs.commented import write_run_file
    from configs.paths import refuse_among_checkpoints
    from launch.show.run import show_new_file

    file = out or Path(f"{name}.yaml")
    refuse_among_checkpoints(file, name="--out")
    write_run_file(file, name=name, source=source)
    show_new_file(file, source=source)


@run_commands.command("check")
def check_command(
    run: RunFile,
    overrides: Overrides,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also estimate the memory of each rank, and say whether it fits.")
    ] = False,
    gpu_memory_gb: Annotated[
        float | None,
        gigabytes_option("--gpu-memory-gb", "With --memory: memory of the GPU.  [default: that of this machine]"),
    ] = None,
    ranks: Annotated[
        int | None,
        count_option("--ranks", "With --memory: all ranks.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a run file, report all of its problems at once, and note what is missing on this machine."""
    from configs.load import load_run
    from data_pipeline.tokenizer_files import find_tokenizer
    from launch.machine import device_type
    from launch.show.console import show_json
    from launch.show.run import run_summary, show_summary
    from training.check_notes import check_notes
    from training.export.while_training import check_export_every

    for option, value in (("--gpu-memory-gb", gpu_memory_gb), ("--ranks", ranks)):
        if value is not None and not memory:
            raise InputError(f"{option} is for the estimate of memory: add --memory, or leave {option} out")
    config = load_run(run, overrides=overrides)
    check_export_every(config)
    fit, origin = _fit_memory(config, ranks=ranks, gpu_memory_gb=gpu_memory_gb) if memory else (None, "")
    if config.data.tokenizer and find_tokenizer(Path(config.data.tokenizer)).is_file():  # else that is a note
        from data_pipeline.prepare import check_tokenizer

        check_tokenizer(config.data)
    device = device_type(os.environ)
    notes = check_notes(config, device=device, environ=os.environ)
    if not memory:
        notes += _simpler_layout_notes(config)
    notes = [hide_secrets(name_run_file(note, run, overrides)) for note in notes]
    summary = run_summary(config, device=device, notes=notes)
    if as_json:
        show_json({**summary, **({"memory": fit.to_json()} if fit else {})})
        return
    show_summary(summary)
    if fit is not None:
        from launch.show.memory import show_memory

        show_memory(fit, origin=origin)


def _simpler_layout_notes(config: "RunConfig") -> list[str]:
    from launch.layout_choice import default_layout, simpler_layout_lines

    layout, _ = default_layout(config, environ=os.environ)
    lines = simpler_layout_lines(config, layout=layout, environ=os.environ)
    return [": ".join(line.strip() for line in lines)] if lines else []


def _fit_memory(config: "RunConfig", *, ranks: int | None, gpu_memory_gb: float | None) -> "tuple[MemoryFit, str]":
    """Estimate a run's memory, and compare it with a GPU of this size, this machine's GPUs, or its memory.

    Returns:
        The estimate and what it was compared with; and where its number of ranks comes from, empty if the user gave it.
    """
    from configs.figures import byte_size
    from launch.layout_choice import default_layout
    from launch.machine import gpu_bytes, gpu_count
    from parallel.layout import Layout
    from training.host_memory import host_limit
    from training.memory_fit import AvailableMemory, fit_memory

    layout, origin = (Layout.of(config, world_size=ranks), "") if ranks else default_layout(config, environ=os.environ)
    gpus = gpu_count(os.environ)
    if gpu_memory_gb is not None:
        size = int(gpu_memory_gb * 1e9)
        available = AvailableMemory(size, f"a GPU of {byte_size(size)} (--gpu-memory-gb)", on_gpu=True)
    elif gpus:
        memory = gpu_bytes(os.environ)
        name = f"this machine's GPU of {byte_size(memory)}" if memory else "name the GPU's memory, --gpu-memory-gb 80"
        available = AvailableMemory(memory, name, on_gpu=True, host=host_limit(), gpus=gpus)
    else:
        limit = host_limit()
        share = limit.size // layout.world_size
        available = AvailableMemory(share, f"the {byte_size(share)} that a rank has of {limit.name}", on_gpu=False)
    return fit_memory(config, layout=layout, available=available), origin


@run_commands.command("prepare")
@explain_out_of_memory("data.sources in smaller files", "data.document_separator, to cut text into documents")
def prepare_command(run: RunFile, overrides: Overrides) -> None:
    """Turn the sources into a tokenizer and training data; parts that are done are skipped."""
    from configs.load import load_run
    from configs.paths import check_run_folder, data_folder, refuse_among_checkpoints

    config = load_run(run, overrides=overrides)
    check_run_folder(config)  # before the slow imports below
    refuse_among_checkpoints(data_folder(config), name="data.dir")

    from data_pipeline.prepare import prepare_data
    from launch.show.run import show_prepared

    with run_file_named(run, overrides):
        try:
            show_prepared(prepare_data(config.data, folder=data_folder(config), progress=True))
        except KeyboardInterrupt:
            again = f"trainshort prepare {typed_path(run)}{typed_overrides(overrides)}"
            logger.warning("stopped: start it again to continue: %s", again)
            raise


@run_commands.command("train")
def train_command(
    run: RunFile,
    overrides: Overrides,
    ranks: Annotated[
        int | None,
        count_option("--ranks", "Local ranks to start.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
    accept_change: Annotated[
        bool, typer.Option("--accept-change", help="Resume even if the model or the data has changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; start and write nothing.")
    ] = False,
) -> None:
    """Train, resuming from the newest checkpoint; start local ranks, or join those of srun or torchrun."""
    from configs.load import load_run
    from launch.failure import ending_at_once
    from parallel.start import find_process_rank

    config = load_run(run, overrides=overrides)
    process_rank = find_process_rank(os.environ)
    if process_rank is not None and ranks is not None:
        raise InputError(
            f"--ranks {ranks} starts local ranks, but this is rank {process_rank.rank} of {process_rank.world_size} "
            f"already: leave --ranks out under {process_rank.starter}"
        )
    if dry_run:
        from launch.show.console import show_lines
        from launch.start_check import dry_run_lines

        with run_file_named(run, overrides):
            show_lines(*dry_run_lines(config, process_rank, ranks=ranks, environ=os.environ))
        return
    if process_rank is None:
        options = ["--accept-change"] if accept_change else []
        with run_file_named(run, overrides):
            code = _start_local_ranks(config, run=run, overrides=overrides, ranks=ranks, options=options)
        raise SystemExit(code)

    with ending_at_once(), run_file_named(run, overrides):
        _train_one_rank(config, process_rank, accept_change=accept_change)


def _train_one_rank(config: "RunConfig", process: "ProcessRank", *, accept_change: bool) -> None:
    from configs.slow_parts import importing, timed
    from launch.machine import require_usable_gpus
    from launch.show.train import following_rank
    from parallel.start import hold_stop_signals, ignore_stop_signals, open_gpu_early
    from training.rank_errors import explain_rank_failure

    # The import below takes seconds. A SIGTERM meanwhile must wait until the rank can save.
    hold_stop_signals()
    with following_rank(config, process, environ=os.environ) as terminal, explain_rank_failure(config, process):
        with timed("imported torch and DeepSpeed", say=logger.debug if process.rank else logger.info), importing():
            open_gpu_early(process, tensor=config.parallel.tensor)
            from training.run import train_rank

        require_usable_gpus(os.environ)
        train_rank(config, process, accept_change=accept_change, terminal=terminal)
    ignore_stop_signals()


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
    from configs.paths import logs_folder, metrics_path
    from launch.layout_choice import simpler_layout_lines
    from launch.local import STOPPED_BY_HAND, start_ranks
    from launch.show.console import show_lines
    from launch.show.train import following_launcher, say_end, train_command_line, verbosity_options
    from launch.start_check import check_start, finished_lines
    from training.export.formats.table import export_problems
    from training.hook import tell_end
    from training.incarnation import refuse_second_start, sole_launcher
    from training.rank_errors import rank_out_of_memory

    ready, device = check_start(config, ranks=ranks, environ=os.environ)
    if ready.finished:
        show_lines(*finished_lines(ready))
        return 0
    if ready.newest is None:  # said before training, not after it
        show_lines(*dict.fromkeys(export_problems(config.model).values()))
        show_lines(*simpler_layout_lines(ready.config, layout=ready.layout, environ=os.environ))
    refuse_second_start(ready.run_dir)
    spoken = verbosity_options()
    given_ranks = ["--ranks", str(ranks)] if ranks else []
    command = command_here("train", *spoken, *options, *override_options(overrides), "--", run)
    again = train_command_line(run, options=[*spoken, *options, *given_ranks], overrides=overrides)
    with sole_launcher(ready.run_dir), following_launcher(ready, device=device, environ=os.environ):
        code = start_ranks(
            command,
            ranks=ready.layout.world_size,
            logs=logs_folder(ready.run_dir),
            metrics=metrics_path(ready.run_dir),
            environ=_environment_of_ranks(),
            explain_memory=partial(rank_out_of_memory, config, ready.layout, on_gpu=False),
        )
        say_end(config, code=code, again=again)
        if code:
            _end_tracking(ready.run_dir, config=config, stopped=code == STOPPED_BY_HAND)
        tell_end(config, code=code, stopped=code == STOPPED_BY_HAND)
        return code


def _environment_of_ranks() -> dict[str, str]:
    """Return this process's environment with its command line, which the ranks record and cannot see."""
    from training.hook import ENDS_TOLD
    from training.reproduction.starts import COMMAND_VARIABLE

    return {**os.environ, COMMAND_VARIABLE: typed_command(), ENDS_TOLD: "1"}


def _end_tracking(run_dir: Path, *, config: "RunConfig", stopped: bool) -> None:
    """End the MLflow run if rank 0 was killed before it could: the run would be shown as running for ever."""
    from training.incarnation import died_here
    from training.tracking.record import read_record
    from training.tracking.spool import has_told_end, trainer_files
    from training.tracking.tracker import attach

    if not died_here(run_dir) or has_told_end(run_dir):
        return  # a newer start trains, or rank 0 has ended it
    record = read_record(run_dir)
    waits = bool(trainer_files(run_dir)) or (record is not None and record.is_open)
    tracker = attach(run_dir, uri=config.track.uri, offline=config.track.offline) if waits else None
    if tracker:
        tracker.finish("KILLED" if stopped else "FAILED", wait_seconds=RECORD_SECONDS)
