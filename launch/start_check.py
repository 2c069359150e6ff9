"""What `train` checks before it starts a rank, and the plan that `train --dry-run` shows. Imports no torch."""

from collections.abc import Iterator, Mapping

from configs.commands import typed_path
from configs.errors import InputError
from configs.files import try_folder
from configs.paths import checkpoints_folder
from configs.schema import RunConfig
from launch.layout_choice import fewest_ranks, simpler_layout_lines
from launch.machine import device_type, gpu_count
from parallel.start import ProcessRank
from training.export.formats.table import export_problems
from training.folder import report_write_errors
from training.incarnation import refuse_second_start
from training.metrics_file import better_of, validation_of
from training.metrics_reader import read_steps
from training.preflight import Ready, branch_line, finished_line, make_ready, newest_to_resume, resume_line
from training.progress_lines import best_line, evaluate_line, start_lines
from training.tracking.store import choose_store, require_known_scheme


def check_start(config: RunConfig, *, ranks: int | None, environ: Mapping[str, str]) -> tuple[Ready, str]:
    """Check everything about a run that needs no rank; write nothing.

    Args:
        config: The run, overrides applied.
        ranks: Value of `--ranks`; None for one per GPU, else the fewest that the layout needs.
        environ: Environment of the ranks.
    Returns:
        The run, and the device type of its ranks: cpu or cuda.
    Raises:
        InputError: the ranks, the MLflow store, the run folder, the data or a checkpoint does not fit the run.
    """
    gpus = gpu_count(environ)
    ranks = ranks or gpus or fewest_ranks(config)
    if 0 < gpus < ranks:
        raise InputError(
            f"--ranks {ranks} is more than this machine's GPUs ({gpus}): start {gpus} or fewer, "
            'or set CUDA_VISIBLE_DEVICES="" for CPU ranks'
        )
    device = "cuda" if gpus else "cpu"
    ready = make_ready(config, world_size=ranks, device=device)
    require_known_scheme(choose_store(config.track.uri, run_dir=ready.run_dir, environ=environ))
    return ready, device


def dry_run_lines(
    config: RunConfig, process: ProcessRank | None, *, ranks: int | None, environ: Mapping[str, str]
) -> list[str]:
    """Do everything that `train` does before its first rank; return the plan, a line each. Writes nothing.

    Args:
        config: The run, overrides applied.
        process: This process among the ranks of srun or torchrun; None where `train` starts the ranks.
        ranks: Value of `--ranks`.
        environ: Environment of the ranks.
    Returns:
        The plan; nothing for all ranks but the first.
    Raises:
        InputError: see `check_start`; or another start of the run is alive here.
        MachineError: the run folder cannot be written.
    """
    is_other = process is not None and process.rank > 0
    if process is None:
        ready, device = check_start(config, ranks=ranks, environ=environ)
    else:
        device = device_type(environ)
        ready = make_ready(config, world_size=process.world_size, device=device)
    if ready.finished:
        return [] if is_other else finished_lines(ready)
    refuse_second_start(ready.run_dir)
    with report_write_errors(ready.run_dir):
        try_folder(checkpoints_folder(ready.run_dir))
    if is_other:
        return []
    simpler = simpler_layout_lines(ready.config, layout=ready.layout, environ=environ)
    return [*start_lines(ready, device=device), *simpler, *_beginning(ready, environ=environ)]


def finished_lines(ready: Ready) -> list[str]:
    """Return what is said of a run that has nothing left to train: its best validation too, and what to type next."""
    best = None
    for fields in read_steps(ready.run_dir):
        best = better_of(best, validation_of(fields))
    return [
        finished_line(ready.run_dir, train=ready.config.train),
        *([] if best is None else [best_line(best)]),
        evaluate_line(ready.run_dir),
    ]


def _beginning(ready: Ready, *, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield where a start would begin, where it would log, and that nothing has begun."""
    config, run_dir = ready.config, ready.run_dir
    newest = newest_to_resume(config, run_dir=run_dir)  # `make_ready` does not warn of broken ones
    if newest is not None:
        yield resume_line(run_dir, step=newest.step)
    elif ready.branch is not None:
        yield branch_line(config, step=ready.branch.step)
    else:
        weights = f", with the weights of {config.train.init_from}" if config.train.init_from else ""
        yield f"begins at step 0{weights}"
        yield from dict.fromkeys(export_problems(config.model).values())
    store = choose_store(config.track.uri, run_dir=run_dir, environ=environ)
    if config.track.offline:
        yield f"records for MLflow, offline: `trainshort track sync {typed_path(run_dir)}` sends to {store.public_uri}"
    else:
        yield f"logs to MLflow at {store.public_uri}"
    yield "dry run: no rank was started, nothing was written"
