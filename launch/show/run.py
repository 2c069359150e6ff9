"""What the command line shows: summaries and tables, on standard output."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs.parameters import parameter_count
from configs.paths import data_folder, run_folder
from configs.schema import RunConfig

if TYPE_CHECKING:
    from data_pipeline.manifest import Prepared
    from training.checkpoint.reshape import Reshape
    from training.checkpoint.verify import Verdict
    from training.generation import Generated


def show_json(document: Any) -> None:
    """Write one JSON document."""
    Console().print(json.dumps(document, indent=2, allow_nan=False), markup=False, highlight=False, soft_wrap=True)


def show_lines(*lines: str) -> None:
    """Write plain lines, never wrapped or styled."""
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_summary(config: RunConfig) -> dict[str, Any]:
    """Return what `check` tells of a valid run."""
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
    found = run_summary(config)
    model_ranks = found["tensor"] * found["pipeline"]
    show_lines(
        f"{found['run']} is valid",
        f"  model     {found['layers']} layers x {found['hidden']} x {found['heads']} heads, {found['position']}: "
        f"{found['parameters']:,} parameters",
        f"  training  {found['steps']:,} steps of {found['tokens_per_step']:,} tokens "
        f"({found['tokens']:,} in all) at length {found['sequence_length']:,}",
        f"  layout    tensor {found['tensor']} x pipeline {found['pipeline']}, ZeRO-{found['zero']}: "
        f"ranks in multiples of {model_ranks}",
        f"  folders   run {found['dir']}, data {found['data']}",
    )


def show_prepared(prepared: "Prepared") -> None:
    """Write what prepared data there is."""
    show_lines(f"{prepared.folder}: {prepared.tokens:,} tokens of {prepared.vocab_size:,} pieces")
    table = Table(box=box.SIMPLE)
    table.add_column("part")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    for part in prepared.parts:
        table.add_row(part.name, f"{part.documents:,}", f"{part.tokens:,}")
    Console().print(table)


def show_report(report: dict[str, Any]) -> None:
    """Write the perplexity table of an evaluation's report."""
    per_word = any("word_perplexity" in result for result in report["results"])
    show_lines(f"{report['checkpoint']}, trained at {report['train_length']:,} tokens")
    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)  # fits 80 columns
    for name in ("length", "x trained", "tokens", "loss", "perplexity", *(["per word"] if per_word else [])):
        table.add_column(name, justify="right")
    table.add_column("protocol", no_wrap=True)
    for result in report["results"]:
        cells = [
            f"{result['length']:,}",
            f"{result['length'] / report['train_length']:g}",
            f"{result['tokens']:,}",
            f"{result['loss']:.4f}",
            f"{result['perplexity']:,.2f}",
        ]
        if per_word:
            cells.append(f"{result['word_perplexity']:,.4g}" if "word_perplexity" in result else "-")
        sliding = result["protocol"] != "nonoverlapping"
        table.add_row(*cells, f"sliding:{result['stride']}" if sliding else "nonoverlapping")
    if report.get("unigram_perplexity") is not None:
        gap = ["-"] if per_word else []
        table.add_section()
        table.add_row("-", "-", "-", "-", f"{report['unigram_perplexity']:,.2f}", *gap, "unigram model")
    Console().print(table)


def show_generated(generated: "Generated", *, as_json: bool) -> None:
    """Write a generated text, and on the standard error stream what it cost."""
    if as_json:
        show_json(asdict(generated))
        return
    show_lines(generated.text)
    each = "" if generated.token_seconds is None else f", {1000 * generated.token_seconds:.1f} ms for each further one"
    total = generated.prompt_tokens + generated.tokens
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{generated.prompt_tokens} tokens of prompt in {generated.prefill_seconds:.2f} s, "
        f"{generated.tokens} new{each}; "
        f"{total:,} in all, {total / generated.train_length:.3g} x the training length"
        f"{'; the document ended' if generated.ended else ''}",
        markup=False,
    )


def show_checkpoints(checkpoints: "list[Verdict]", *, folder: Path) -> None:
    """Write the checkpoints of a run."""
    if not checkpoints:
        show_lines(f"{folder} has no checkpoint yet")
        return
    table = Table(box=box.SIMPLE)
    for name in ("step", "MB", "validation"):
        table.add_column(name, justify="right")
    table.add_column("checkpoint")
    for checkpoint in checkpoints:
        found = checkpoint.to_json()
        step, loss = found["step"], found["validation_loss"]
        size = "broken" if checkpoint.problems else f"{checkpoint.bytes / 1e6:,.1f}"
        table.add_row(
            "-" if step is None else f"{step:,}", size, "-" if loss is None else f"{loss:.4f}", str(checkpoint.path)
        )
    Console(soft_wrap=True).print(table)
    show_lines(*(problem for checkpoint in checkpoints for problem in checkpoint.problems))


def show_verdicts(checkpoints: "list[Verdict]") -> None:
    """Write which checkpoints are whole, and what is wrong with the others."""
    for checkpoint in checkpoints:
        if checkpoint.problems:
            show_lines(f"broken  {checkpoint.path}", *(f"        {problem}" for problem in checkpoint.problems))
        else:
            show_lines(f"whole   {checkpoint.path}  ({checkpoint.bytes / 1e6:,.1f} MB read)")


def show_reshape(plan: "Reshape") -> None:
    """Write how each tensor of a checkpoint would be cut."""
    show_lines(
        f"{plan.path}: saved with tensor {plan.tensor} x pipeline {plan.pipeline}, read by {plan.layout}; "
        f"{plan.state_bytes / 1e6:,.1f} MB of weights and moments"
    )
    table = Table(box=box.SIMPLE)
    for name in ("tensor", "rule", "shape", "saved", "read", "padding"):
        table.add_column(name, no_wrap=True)
    for cut in plan.cuts:
        rule = f"{cut.rule}, tied" if cut.tied else cut.rule
        parts = (_parts(cut.saved), _parts(cut.wanted))
        table.add_row(cut.name, rule, " x ".join(map(str, cut.shape)), *parts, str(cut.padding or ""))
    Console(width=120).print(table)


def _parts(parts: tuple[int, ...]) -> str:
    """Return slices in words: 2 x 200, or 200 + 199."""
    if not parts:
        return "whole"
    return f"{len(parts)} x {parts[0]}" if len(set(parts)) == 1 else " + ".join(map(str, parts))
