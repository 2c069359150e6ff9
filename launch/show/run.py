"""Output of `init`, `check` and `prepare`."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.commands import typed_path
from configs.errors import InputError
from configs.paths import data_folder, run_folder
from configs.schema import RunConfig
from configs.terminal import printable
from launch.show.console import show_lines, show_table, wide_table
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.checkpoint.title import named_step
from training.export.formats.table import export_problems
from training.families.table import parameter_count
from training.least_density import attention_here
from training.progress_lines import step_lengths, step_tokens, tokens_in_all
from training.state import TrainState

if TYPE_CHECKING:
    from data_pipeline.manifest import Prepared


def run_summary(config: RunConfig, *, device: str, notes: Sequence[str]) -> dict[str, Any]:
    """Return the figures that `check` reports of a valid run, and what it noticed around it.

    Args:
        config: The run.
        device: Device type of this machine's ranks: cpu or cuda.
        notes: What it noticed.
    """
    parallel, model = config.parallel, config.model
    before, known = _begins_at(config)
    return {
        "run": config.run.name,
        "dir": str(run_folder(config)),
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "position": model.position,
        "attention": attention_here(config, device=device),
        "parameters": parameter_count(model, vocab_size=config.data.vocab_size),
        "sequence_length": config.data.sequence_length,
        "tokens_per_step": config.train.global_batch * config.data.sequence_length,
        "step_tokens": step_tokens(config, after=before or 0),
        "step_lengths": step_lengths(config, after=before or 0),
        "tokens": None if known is None else tokens_in_all(config, start=known),
        "steps": config.train.steps,
        "first_step": None if before is None else before + 1,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "zero": parallel.zero,
        "data": str(data_folder(config)),
        "export_problems": export_problems(model),
        "notes": list(notes),
    }


def _begins_at(config: RunConfig) -> tuple[int | None, TrainState | None]:
    """Return the step that a run begins after, and a state from which its tokens count on; None for what is not known.

    A branch begins after the steps of its trunk, which have other sizes. Where that checkpoint is gone, its name has
    the step, and the branch's own checkpoint may have the tokens.
    """
    if config.train.branch_from is None:
        return 0, TrainState(0, 0)
    from training.folder import with_fixed_keys  # here: it imports numpy

    run_dir, place = run_folder(config), Path(config.train.branch_from)
    with suppress(InputError):  # a note says so
        place = Path(str(with_fixed_keys(config, run_dir=run_dir).train.branch_from))
    trunk, own = _state_in(place), [_state_in(saved.path) for saved in list_checkpoints(run_dir)[-1:]]
    step = trunk.step if trunk else named_step(place)
    if step is not None and step >= config.train.steps:  # which a note refuses
        return 0, TrainState(0, 0)
    return step, trunk or next(iter(own), None)


def _state_in(checkpoint: Path) -> TrainState | None:
    with suppress(InputError):
        return read_manifest(checkpoint)
    return None


def show_summary(summary: dict[str, Any]) -> None:
    """Write the summary of a valid run, from `run_summary`."""
    model_ranks, tokens = summary["tensor"] * summary["pipeline"], summary["tokens"]
    in_all = "those of its trunk are not known" if tokens is None else f"{tokens:,} in all"
    show_lines(
        f"{summary['run']} is valid",
        f"  model     {summary['layers']} layers x {summary['hidden']} x {summary['heads']} heads, "
        f"{summary['position']}: {summary['parameters']:,} parameters",
        f"  attention {summary['attention']}",
        f"  training  {_steps(summary)} of {summary['step_tokens']} tokens "
        f"({in_all}) at length {summary['step_lengths']}",
        f"  layout    tensor {summary['tensor']} x pipeline {summary['pipeline']}, ZeRO-{summary['zero']}: "
        f"ranks in multiples of {model_ranks}",
        f"  folders   run {summary['dir']}, data {summary['data']}",
        *(f"  export    {problem}" for problem in dict.fromkeys(summary["export_problems"].values())),
        *(f"note: {note}" for note in summary["notes"]),
    )


def _steps(summary: dict[str, Any]) -> str:
    first, last = summary["first_step"], summary["steps"]
    if first is None:
        return f"steps up to {last:,}"
    return f"{last:,} steps" if first == 1 else f"steps {first:,} to {last:,}"


def show_prepared(prepared: "Prepared") -> None:
    """Write the size of prepared data, and a table of its parts."""
    show_lines(f"{prepared.folder}: {prepared.tokens:,} tokens, vocabulary of {prepared.vocab_size:,}")
    table = wide_table(("part", "documents", "tokens"), left=("part",))
    for part in prepared.parts:
        table.add_row(printable(part.name), f"{part.documents:,}", f"{part.tokens:,}")
    show_table(table)


def show_new_file(file: Path, *, source: str) -> None:
    """Write what to do with a run file that `init` has written."""
    name = typed_path(file)
    show_lines(
        f"{file} is written from {source}: edit it, data.sources first, then type",
        f"  trainshort check {name}",
        f"  trainshort prepare {name}",
        f"  trainshort train {name}",
    )
