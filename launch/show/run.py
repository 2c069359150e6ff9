"""Output of `check` and `prepare`."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.paths import data_folder, run_folder
from configs.schema import RunConfig
from launch.show.console import show_lines, wide_table
from training.families.table import parameter_count

if TYPE_CHECKING:
    from data_pipeline.manifest import Prepared


def run_summary(config: RunConfig) -> dict[str, Any]:
    """Return the figures that `check` reports of a valid run."""
    parallel, model = config.parallel, config.model
    return {
        "run": config.run.name,
        "dir": str(run_folder(config)),
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "position": model.position,
        "parameters": parameter_count(model, vocab_size=config.data.vocab_size),
        "sequence_length": config.data.sequence_length,
        "tokens_per_step": config.train.global_batch * config.data.sequence_length,
        "tokens": config.train.steps * config.train.global_batch * config.data.sequence_length,
        "steps": config.train.steps,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "zero": parallel.zero,
        "data": str(data_folder(config)),
    }


def show_summary(config: RunConfig) -> None:
    """Write the summary of a valid run."""
    summary = run_summary(config)
    model_ranks = summary["tensor"] * summary["pipeline"]
    show_lines(
        f"{summary['run']} is valid",
        f"  model     {summary['layers']} layers x {summary['hidden']} x {summary['heads']} heads, "
        f"{summary['position']}: {summary['parameters']:,} parameters",
        f"  training  {summary['steps']:,} steps of {summary['tokens_per_step']:,} tokens "
        f"({summary['tokens']:,} in all) at length {summary['sequence_length']:,}",
        f"  layout    tensor {summary['tensor']} x pipeline {summary['pipeline']}, ZeRO-{summary['zero']}: "
        f"ranks in multiples of {model_ranks}",
        f"  folders   run {summary['dir']}, data {summary['data']}",
    )


def show_prepared(prepared: "Prepared") -> None:
    """Write the size of prepared data, and a table of its parts."""
    show_lines(f"{prepared.folder}: {prepared.tokens:,} tokens, vocabulary of {prepared.vocab_size:,}")
    table = wide_table(("part", "documents", "tokens"), left=("part",))
    for part in prepared.parts:
        table.add_row(part.name, f"{part.documents:,}", f"{part.tokens:,}")
    Console().print(table)
